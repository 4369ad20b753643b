"""A graph for ONNX runtimes."""

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

from dino_sd.errors import UserError
from dino_sd.exported import Exported, Usage

TOLERANCE = 1e-4
GRAPH = True
FILE = "model.onnx"
MOST = 1_800_000_000  # bytes of weights in one file: protobuf ends at 2 GiB


def refuse(exported: Exported) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(name) is None:
            raise UserError(f"format=onnx needs {name}; install the extra: pip install 'dino-sd[onnx]'")


def write(folder: Path, exported: Exported) -> None:
    """One file; weights beyond what ONNX holds in one lie beside it in model.onnx.data."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    axes = {0: "batch", **({2: "height", 3: "width"} if exported.dynamic_size else {})}
    program = exported.program
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.onnx about itself
        torch_log = logging.getLogger("torch.onnx")
        level = torch_log.level
        torch_log.setLevel(logging.ERROR)
        try:
            graph = torch.onnx.export(
                program, (), dynamo=True, verbose=False, input_names=["images"], output_names=exported.outputs,
                dynamic_shapes={"images": axes},
            )  # fmt: skip
        except Exception as error:  # torch.onnx raises what it likes; whoever wants to know more has the cause
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(
                f"export: torch.onnx cannot translate model={exported.backbone.name}: {reason}; use format=pt2"
            ) from error
        finally:
            torch_log.setLevel(level)
    assert graph is not None
    ClearMetadataAndDocStringPass()(graph.model)  # names of files on this machine, as large as a small model
    graph.model.metadata_props.update(exported.metadata())
    size = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    graph.save(folder / FILE, external_data=size > MOST)


def usages(exported: Exported) -> list[Usage]:
    load = f'import numpy as np\nimport onnxruntime\nsession = onnxruntime.InferenceSession("FOLDER/{FILE}")'
    call = f'{", ".join(exported.outputs)} = session.run({exported.outputs!r}, {{"images": np.asarray(images)}})'
    return [Usage("onnxruntime", load, call.replace("'", '"'))]
