# docker build -t sparsek . && docker run --rm -it -v "$PWD:/models" sparsek chat tiny
# On a GPU: add --gpus all to `docker run`; torch's wheels bring CUDA with them.
FROM python:3.11-slim

# Triton compiles its launcher when a kernel first runs.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY kernels kernels
COPY recipes recipes
COPY sparsek_cli sparsek_cli
RUN pip install --no-cache-dir --constraint constraints.txt '.[gguf]'
WORKDIR /models
ENTRYPOINT ["sparsek"]
CMD ["--help"]
