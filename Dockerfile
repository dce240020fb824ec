# docker build --target cpu --build-arg TORCH_INDEX=... -t softdefend:cpu .      docker run --rm softdefend:cpu demo
# docker build --target cuda -t softdefend:cuda .    docker run --rm --gpus all -v "$PWD/runs:/work/runs" softdefend:cuda train ...
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim AS base
ENV PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 user && install --directory --owner user /work
WORKDIR /work
COPY requirements.lock requirements-torch.lock constraints.txt /locks/
ENTRYPOINT ["softdefend"]
CMD ["--help"]

# torch for the CPU alone is a tenth of the size; PyTorch's installation page names the index that it comes from.
FROM base AS cpu
ARG TORCH_INDEX
RUN pip install --no-cache-dir --constraint /locks/constraints.txt torch \
        --index-url "${TORCH_INDEX:?the index of torch builds for the CPU}" \
    && pip install --no-cache-dir --require-hashes --requirement /locks/requirements.lock
RUN --mount=from=wheel,source=/wheels,target=/wheels pip install --no-cache-dir --no-deps /wheels/*.whl
USER user

# torch from PyPI brings the CUDA libraries; the driver is the host's. Triton compiles its launchers with gcc.
FROM base AS cuda
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir --require-hashes --requirement /locks/requirements.lock \
        --requirement /locks/requirements-torch.lock
RUN --mount=from=wheel,source=/wheels,target=/wheels pip install --no-cache-dir --no-deps /wheels/*.whl
USER user
