# An image with the library and the `beit` command, for one kind of GPU:
#
#   docker build -t beit .                                              # Ampere, Hopper and newer: CUDA 13
#   docker build -t beit:v100 --build-arg CUDA=cu126 .                  # V100: the last CUDA with code for it
#   docker run --rm --gpus all --ipc host -v /data:/data beit \
#       torchrun --nproc-per-node=8 -m run_beit_pretraining --help
#
# PyTorch's wheels bring CUDA along; the machine needs only NVIDIA's driver and container toolkit.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG CUDA=cu130
ARG TORCH="torch>=2.6,<2.15"
# The compiler is torch.compile's (--compile).
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir "${TORCH}" torchvision --index-url "https://download.pytorch.org/whl/${CUDA}"

COPY . /opt/beit
RUN pip install --no-cache-dir "/opt/beit[hub,webdataset]"

WORKDIR /workspace
CMD ["beit", "--help"]
