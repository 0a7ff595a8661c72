# docker build -t megagrin .                    for NVIDIA GPUs, on NVIDIA's PyTorch image
# docker build -t megagrin:cpu --target cpu .   for CPUs, on plain Python
# docs/launch.md says how to run them, and what of this file has been tried.

# 26.06 holds torch 2.13.0a0, Python 3.12 and CUDA 13.3; setup.py asks for torch 2.11 to 2.13.
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
ARG CPU_BASE=python:3.11-slim

FROM ${CPU_BASE} AS cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG EXTRAS=hf,plot,tensorboard,wandb
# The index of torch's CPU builds; without it the CUDA build and its libraries are installed, several GB of them.
ARG TORCH_INDEX_URL=
# Any numeric id; without a line in /etc/passwd torch's caches need HOME and USER.
ARG UID=1000
ENV HOME=/workspace USER=megagrin PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/megagrin
COPY constraints.txt .
RUN pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -c constraints.txt torch
COPY . .
RUN pip install -c constraints.txt -e ".[${EXTRAS}]"
RUN mkdir -p /workspace && chmod 1777 /workspace
WORKDIR /workspace
USER ${UID}
ENTRYPOINT ["megagrin"]
CMD ["--help"]

FROM ${BASE} AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG EXTRAS=hf,plot,tensorboard,wandb
ARG UID=1000
ENV HOME=/workspace USER=megagrin PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /opt/megagrin
COPY . .
# NVIDIA builds this image's torch, triton and numpy for each other: they are pinned as found, and the build fails if pip replaced
# one all the same. Everything else follows constraints.txt instead of the image's own constraints (PIP_CONSTRAINT).
RUN versions() { python3 -c 'import numpy, torch, triton; print(torch.__version__, triton.__version__, numpy.__version__)'; } \
    && before=$(versions) \
    && grep -vE '^(torch|triton|numpy)[=<>]' constraints.txt > /tmp/constraints.txt \
    && pip list --format=freeze | grep -E '^(torch|triton|numpy)==' >> /tmp/constraints.txt \
    && PIP_CONSTRAINT='' pip install -c /tmp/constraints.txt -e ".[${EXTRAS}]" \
    && after=$(versions) \
    && if [ "$before" != "$after" ]; then echo "torch triton numpy were $before and became $after" >&2; exit 1; fi
RUN mkdir -p /workspace && chmod 1777 /workspace
WORKDIR /workspace
USER ${UID}
ENTRYPOINT ["megagrin"]
CMD ["--help"]
