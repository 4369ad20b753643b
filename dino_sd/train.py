"""The one loop. It reads from top to bottom, and the optimizer's step is in it."""

import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dino_sd import build, checkpoint
from dino_sd.allocator import return_free_memory, reuse_freed_memory
from dino_sd.config import Config
from dino_sd.data.loader import Batch, Batches, pick_workers
from dino_sd.data.mix import Mix
from dino_sd.data.photometry import Photometry
from dino_sd.distributed import (
    agree,
    all_gather_rows,
    all_reduce_mean_,
    any_rank,
    barrier,
    is_main,
    local_world_size,
    rank,
    say,
    setup,
    together,
    world_size,
)
from dino_sd.errors import Diverged, Interrupted
from dino_sd.health import Health
from dino_sd.log import Log
from dino_sd.optim import clip_each_, make_optimizer, set_rates
from dino_sd.preemption import Requests
from dino_sd.report.training import Reports
from dino_sd.run import Anomalies, BadFiles, check_equal_weights, check_same_run, claim, describe, introduce
from dino_sd.settings import plain
from dino_sd.validation import Validation


def train(cfg: Config) -> Path:
    """Trains, or goes on where `out` holds an unfinished run; returns the newest checkpoint.

    Raises Interrupted where it was asked to stop, Halted where a guard has stopped it.
    """
    device = setup(cfg.device, cfg.timeout)
    with Requests(Path(cfg.out)) as requests:
        requests.forget()
        try:
            return _train(cfg, device, requests)
        except Diverged as error:
            say(f"warning: {error}; going back to the newest checkpoint, with half the learning rate")
        return _train(cfg, device, requests, 0.5)  # out here: the exception holds on to all that the first one made


def _train(cfg: Config, device: torch.device, requests: Requests, slowed: float = 1.0) -> Path:
    """slowed: factor of the learning rate from here on; below 1 in a run that has diverged once."""
    torch.set_float32_matmul_precision("high" if cfg.precision == "bf16" else "highest")  # high: TF32 on CUDA
    torch.backends.cudnn.allow_tf32 = cfg.precision == "bf16"
    if device.type == "cpu":
        reuse_freed_memory()
    torch.manual_seed(cfg.seed)
    run = Path(cfg.out)
    resumed = checkpoint.newest_good(run)
    backbone = build.make_backbone(cfg, cfg.drop_path, resuming=resumed is not None)
    source = build.open_data(cfg)
    length = build.length_of(cfg, source.epoch_images())
    if resumed:
        check_same_run(resumed, run, cfg, source)
    start = resumed["step"] if resumed else 0
    agree(start, "the step to go on from")
    slowed = min(slowed, resumed["slowed"]) if resumed else slowed
    if start >= length.steps:
        say(f"{run} is finished ({start} steps); nothing to do")
        return checkpoint.path_of(run, start)

    data, bad = (resumed["data"], []) if resumed else describe(source, cfg)
    method = build.make_method(cfg, backbone, length, device, data)
    optimizer = make_optimizer(cfg.optim.name, method.student)
    scores = resumed["scores"] if resumed else {}
    window, skipped = Window(), {"count": 0, "in_a_row": 0}
    health = Health(
        every=cfg.health.every, stop=cfg.health.on_collapse == "stop", warmup=length.of(cfg.optim.warmup),
        steps=length.steps,
    )  # fmt: skip
    if resumed:
        if "health" in resumed:  # older checkpoints have none: its history begins anew
            health.load_state_dict(resumed["health"], device)
        method.student.load_state_dict(resumed["student"])
        method.teacher.load_state_dict(resumed["teacher"])
        method.terms.load_state_dict(resumed["terms"])
        optimizer.load_state_dict(resumed["optimizer"])
        same = resumed["ranks"] == world_size()  # with other ranks, each goes on with the mean of all
        sums = {name: total[rank()] if same else total.mean() for name, total in resumed["window"].items()}
        window = Window({name: total.to(device) for name, total in sums.items()}, resumed["window_steps"])
        skipped = resumed["skipped"] if slowed == resumed["slowed"] else {**resumed["skipped"], "in_a_row": 0}
        say(f"going on from step {start} of {length.steps} in {run}")
        if resumed["ranks"] != world_size():
            say(f"{resumed['ranks']} rank(s) until then, {world_size()} from now on: the batch of a step stays "
                f"{cfg.batch_size} images, {cfg.batch_size // world_size()} on each rank")  # fmt: skip
    owes = bool(resumed and resumed.get("owes"))  # what was due when it had to stop
    known_bad, known_lines = (resumed.get("bad_files"), resumed.get("metrics")) if resumed else (0, None)
    resumed = None  # a second copy of everything would otherwise live as long as the run

    introduce(cfg, device, method, data)  # before DDP makes all weights rank 0's
    model = method
    if world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        with warnings.catch_warnings():  # torch 2.14 has a new word for broadcast_buffers, which 2.11 does not know
            warnings.simplefilter("ignore", FutureWarning)
            model = DistributedDataParallel(method, ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")
    spec = build.view_spec(cfg, method.wants_clean)
    if spec.dropped:
        say(f"channels={cfg.channels}: {spec.dropped} mean nothing without RGB and are left out")
    workers = pick_workers(
        cfg.workers, device.type, local_world_size(), source, spec, cfg.batch_size // (cfg.accumulate * world_size())
    )
    batches = Batches(
        source, spec, seed=cfg.seed, batch_size=cfg.batch_size, accumulate=cfg.accumulate, rank=rank(),
        world_size=world_size(), start_step=start, total_steps=length.steps, workers=workers, device=device,
    )  # fmt: skip
    dtype = torch.float64 if cfg.precision == "fp64" else torch.float32
    photometry = Photometry(spec, data["mean"], data["std"], data["range"])
    mix = build.make_mix(cfg, spec, data)
    learning_rate = build.learning_rate(cfg, length)
    weight_decay = build.make_schedule(cfg.optim.weight_decay, length, "optim.weight_decay")
    parameters = list(method.student.parameters())
    evaluate = Validation(cfg, method, device, data)
    # Everything that can be wrong with the settings has been found by now.
    lock = claim(run, cfg)
    due = Due(cfg, length)
    saver = checkpoint.Saver(
        run, cfg.checkpoint.keep, due.milestone, cfg.checkpoint.best, cfg.checkpoint.on_error == "stop", start
    )
    anomalies = Anomalies(run, source, **skipped)
    norms = BatchNorms(method)
    bad_files = BadFiles(run, len(source), cfg.data.most_bad, known_bad)
    bad_files.add((*source.bad, *bad))
    bad_files.share()
    views = on_device(bad_files.of(batches), photometry, mix, device, dtype)
    log = Log(
        run, start_step=start, steps=length.steps, active=is_main(), wandb=cfg.log.wandb, config=plain(cfg),
        known=known_lines,
    )  # fmt: skip
    saved = checkpoint.path_of(run, start)
    reports = Reports(cfg, length, source, data, start)

    def judge(done: int) -> None:
        """Evaluates and draws where that is due."""
        nonlocal scores
        if due.evaluate(done):
            scores = evaluate(method)
            log.write(done, scores)
            if done:
                log.progress(done)
            window.restart_clock()
        if reports.due(done):
            reports(done, method)
            window.restart_clock()

    def save(done: int, owes: bool = False) -> None:
        """owes: what is due at this step is put off until the run goes on."""
        nonlocal saved
        saved = checkpoint.path_of(run, done)
        unreadable = bad_files.share()
        sums, watched = window.of_ranks(), health.state_dict()
        log.sync()

        def write() -> None:
            if not is_main():
                return
            state = {
                "step": done, "steps": length.steps, "config": plain(cfg), "data": data, "result": method.result,
                "student": method.student.state_dict(), "teacher": method.teacher.state_dict(),
                "terms": method.terms.state_dict(), "optimizer": optimizer.state_dict(), "window": sums,
                "window_steps": window.steps, "scores": scores, "ranks": world_size(), "slowed": slowed,
                "skipped": anomalies.state(), "health": watched, "bad_files": unreadable, "metrics": log.state(),
                "owes": owes,
            }  # fmt: skip
            saver.save(saved, state, log.latest)

        together(write)

    done = start
    with lock, reports:
        if start == 0 or owes:
            judge(start)
        if owes and due.checkpoint(start):
            save(start)  # with the scores that it would have had
        if start == 0:
            say(f"training {cfg.model} on {len(source):,} images, {length.steps:,} steps; a line every {cfg.log.every}")
        requests.started = True
        for step in range(start, length.steps):
            t = step / length.steps
            set_rates(optimizer, slowed * learning_rate(t), weight_decay(t))
            torch.manual_seed(seed_of(cfg.seed, step, rank()))  # dropout and drop-path = f(seed, step, rank)
            parts: list[Part] = []
            for part in range(cfg.accumulate):
                with window.waiting():
                    groups, indices, labels = next(views)
                last = part == cfg.accumulate - 1
                synced = nullcontext() if last or model is method else model.no_sync()  # pyright: ignore
                with synced:
                    with autocast:
                        losses = model(groups, len(indices), labels, t)
                    loss = sum(losses.values()) / cfg.accumulate
                    loss.backward()  # pyright: ignore
                losses = {name: value.detach() for name, value in losses.items()}  # without the graphs behind them
                value = loss.detach() * cfg.accumulate  # pyright: ignore
                parts.append(Part(indices, losses, value, method.signs, method.pooled_BD, method.targets))
            norm = clip_each_(parameters, cfg.optim.clip)
            # The one number a step that is waited for: what is not finite must not get into weights, teacher or centre.
            total = torch.stack([norm, *(part.loss for part in parts)]).sum()
            asked, unsound = any_rank(requests.pending(), not bool(torch.isfinite(total)))
            done = step + 1
            if unsound:  # on all ranks alike: no step, no teacher, no centre
                anomalies.note(step, parts, float(norm))
                method.skip_step()
                norms.restore_()
                if anomalies.in_a_row >= cfg.most_skipped:
                    together(saver.wait)  # all ranks go back to the same one
                    anomalies.give_up(slowed)
            else:
                anomalies.in_a_row = 0
                for part in parts:
                    window.add({"loss": part.loss, **part.signs}, 1 / cfg.accumulate)
                    health.see(done, {"loss": part.loss, **part.signs}, part.pooled_BD, part.targets)
                window.add({"gradient_norm": norm})
                for parameter in method.frozen_parameters(t):
                    parameter.grad = None
                health.before_step(done, parameters)
                optimizer.step()
                health.after_step(parameters, norm)
                method.after_step(t)
                norms.keep()
                window.step()
            optimizer.zero_grad(set_to_none=True)
            window.images += cfg.batch_size
            if step == start and device.type == "cpu":
                return_free_memory()

            final = done == length.steps
            judged = health.judge(done)
            if done % cfg.log.every == 0 or final:
                values = {**window.means(), "lr": slowed * learning_rate(t), "epoch": done / length.steps_per_epoch}
                values |= {"bad_files": count} if (count := bad_files.share()) else {}
                values |= {"skipped_steps": anomalies.count} if anomalies.count else {}
                log.write(done, values | judged)
                log.progress(done)
                check_equal_weights(method, done)
            elif judged:
                log.write(done, judged)
            if judged:
                if health.verdict.collapsed:
                    together(saver.wait)  # it may be what ends the run: what became of the last save is said before
                health.act()
            stopping = asked and not final  # an evaluation may take longer than there is time
            if not stopping:
                judge(done)
            if due.checkpoint(done) or final or asked:
                save(done, owes=stopping and (due.evaluate(done) or reports.due(done)))
            if stopping:
                break
        together(lambda: saver.wait(last=True))
        log.close()
        if bad_files.known:
            say(f"{len(bad_files.known)} image(s) could not be read, others stood in: {bad_files.path}")
        barrier()
        if done < length.steps:
            requests.forget()
            raise Interrupted(f"step {done} of {length.steps} is saved ({saved}); the same command goes on")
    return saved


class Part(NamedTuple):
    """What a part of a step's batch came to. indices: of its images, on the CPU. losses: weighted, by term.

    pooled_BD, targets: see SelfDistillation.
    """

    indices: Tensor
    losses: dict[str, Tensor]
    loss: Tensor
    signs: dict[str, Tensor]
    pooled_BD: Tensor
    targets: tuple[Tensor, Tensor] | None


class BatchNorms:
    """Running statistics as they were after the last sound step: a forward pass of bad numbers spoils them for good."""

    def __init__(self, method: torch.nn.Module):
        modules = [module for module in method.modules() if isinstance(module, _BatchNorm)]
        self.buffers = [buffer for module in modules for buffer in module.buffers()]
        self.kept = [buffer.clone() for buffer in self.buffers]

    def keep(self) -> None:
        if self.buffers:
            torch._foreach_copy_(self.kept, self.buffers)

    def restore_(self) -> None:
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.kept)


class Window:
    """Sums since the last line of the log. They stay on the device; `means` is the one place that waits for it."""

    def __init__(self, sums: dict[str, Tensor] | None = None, steps: int = 0):
        self.sums, self.steps = dict(sums or {}), steps
        self.restart_clock()

    def restart_clock(self) -> None:
        self.began, self.waited, self.images = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def add(self, values: dict[str, Tensor], share: float = 1.0) -> None:
        for name, value in values.items():
            value = value.detach() * share
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def step(self) -> None:
        self.steps += 1

    def of_ranks(self) -> dict[str, Tensor]:
        """The sums of every rank, (ranks,) each: what a checkpoint holds."""
        if not self.sums:
            return {}
        rows_RN = all_gather_rows(torch.stack(list(self.sums.values()))[None])
        return dict(zip(self.sums, rows_RN.unbind(1), strict=True))

    def means(self) -> dict[str, float]:
        """Over the steps since the last call and over ranks; starts anew."""
        means: dict[str, float] = {}
        if self.sums:  # unless all steps were skipped
            values = all_reduce_mean_(torch.stack(list(self.sums.values())) / self.steps).tolist()
            means = dict(zip(self.sums, values, strict=True))
        elapsed = time.perf_counter() - self.began
        means |= {"images_per_s": self.images / elapsed, "data_wait": self.waited / elapsed}
        self.sums, self.steps = {}, 0
        self.restart_clock()
        return means


class Due:
    """When to save and when to evaluate, in steps."""

    def __init__(self, cfg: Config, length: build.Length):
        self.steps, self.evaluates = length.steps, cfg.evaluate.every is not None
        self.evaluate_every = max(length.of(cfg.evaluate.every), 1) if cfg.evaluate.every is not None else 0
        self.checkpoint_every = max(length.of(cfg.checkpoint.every), 1)
        milestone = cfg.checkpoint.milestone
        self.milestone = max(length.of(milestone), 1) if milestone is not None else None

    def evaluate(self, done: int) -> bool:
        return self.evaluates and (done % self.evaluate_every == 0 or done == self.steps)

    def checkpoint(self, done: int) -> bool:
        return done % self.checkpoint_every == 0 or bool(self.milestone and done % self.milestone == 0)


def on_device(
    batches: Iterable[Batch], photometry: Photometry, mix: Mix | None, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[list[Tensor], Tensor, Tensor | None]]:
    """Stage two of the views: (groups of normalised crops, indices of their images, labels) for each part of a step."""
    for batch in ahead(batches, device):
        groups = [photometry(crops, rows).to(dtype) for crops, rows in zip(batch.groups, batch.rows, strict=True)]
        if mix is not None and batch.labels is not None:
            groups[0], labels = mix(groups[0], batch.labels)
        else:
            labels = None if batch.labels is None else batch.labels.to(device, non_blocking=True)
        yield groups, batch.indices, labels


def ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches whose crops are on the device; on CUDA the next one is copied while this one is worked on."""
    if device.type != "cuda":
        for batch in batches:
            yield replace(batch, groups=[crops.to(device) for crops in batch.groups])
        return
    copying, before = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(copying):
            coming = replace(batch, groups=[crops.to(device, non_blocking=True) for crops in batch.groups])
            copied = copying.record_event()
        if before is not None:
            yield arrived(*before)
        before = coming, copied
    if before is not None:
        yield arrived(*before)


def arrived(batch: Batch, copied: Any) -> Batch:
    """Whatever is done with the batch from now on waits for its copy, and its memory is kept until that is done."""
    stream = torch.cuda.current_stream()
    stream.wait_event(copied)
    for crops in batch.groups:
        crops.record_stream(stream)
    return batch


def seed_of(seed: int, step: int, rank: int) -> int:
    """Spread so that neighbouring seeds, steps and ranks share nothing."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63
