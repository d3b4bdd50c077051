# fastssl on CUDA 13: docker build -t fastssl . && docker run --gpus all --shm-size 8g -v /data:/data fastssl train --help
# Linted, but not built yet for want of a registry, and not yet run on a GPU. torch brings its own CUDA libraries.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PATH=/opt/fastssl/bin:$PATH

# gcc and Python's headers: torch and Triton compile the step's kernels where it runs. Ubuntu's archive keeps no old
# versions, so that pinned ones would soon stop the build.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/fastssl

WORKDIR /src
COPY constraints.txt pyproject.toml setup.cfg README.md LICENSE ./
COPY fastssl fastssl
COPY loaders loaders
RUN pip install -c constraints.txt '.[dali,tensorboard]' && rm -rf /src/build

WORKDIR /work
ENTRYPOINT ["fastssl"]
CMD ["--help"]
