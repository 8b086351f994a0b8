# kglmatch and its command line, with the versions of constraints.txt.
#
#   docker build -t kglmatch .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" kglmatch match vis.png ir.png -o matches.png
#
# For CUDA, PyTorch as PyPI has it, with CUDA's libraries (untried: this image has never run on a GPU):
#
#   docker build -t kglmatch:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/data" kglmatch:cuda match vis.png ir.png --device cuda
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/kglmatch
WORKDIR /source
# PyTorch in a layer of its own: it is large, and changes with constraints.txt alone.
COPY constraints.txt .
RUN /opt/kglmatch/bin/pip install -c constraints.txt --extra-index-url "${TORCH_INDEX}" torch
COPY . .
RUN /opt/kglmatch/bin/pip install -c constraints.txt --extra-index-url "${TORCH_INDEX}" .

FROM python:${PYTHON}-slim-bookworm
# OpenCV is linked against these.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/kglmatch /opt/kglmatch
RUN useradd --create-home --uid 1000 kglmatch
USER 1000
ENV PATH=/opt/kglmatch/bin:$PATH
WORKDIR /data
ENTRYPOINT ["kglmatch"]
CMD ["--help"]
