# Builds and serves on a CPU (docs/serving.md).
#   docker build --build-arg TORCH_INDEX=URL -t moveimg .
# URL: the CPU index that PyTorch's own page names; without it pip takes a CUDA build, 6 GB.
FROM python:3.11-slim

ARG TORCH_INDEX=""
WORKDIR /opt/moveimg
RUN useradd --create-home --uid 1000 moveimg \
    && if [ -n "$TORCH_INDEX" ]; then \
        pip install --no-cache-dir --index-url "$TORCH_INDEX" 'torch>=2.9' 'torchvision>=0.24'; \
    fi
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY tokenizer tokenizer
COPY moveimg moveimg
RUN pip install --no-cache-dir 'moveimg[serve] @ file:///opt/moveimg'

USER 1000
WORKDIR /home/moveimg
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["moveimg", "serve", "--host", "0.0.0.0"]
