FROM pytorch/pytorch:2.11.0-cuda12.8-cudnn9-runtime

# The base image brings torch and torchvision; pip keeps them and adds the rest.
COPY pyproject.toml README.md LICENSE /opt/dino_sd/
COPY dino_sd /opt/dino_sd/dino_sd
COPY configs /opt/dino_sd/configs
RUN pip install --no-cache-dir /opt/dino_sd \
    && useradd --create-home --uid 1000 dino
USER dino
WORKDIR /home/dino
ENTRYPOINT ["dino-sd"]
