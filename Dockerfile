# Two images from one file:
#   docker build --target web -t luthier-web .    the web process and the relay; no torch in it
#   docker build --target gpu -t luthier-gpu .    the workers; pip takes the torch build for the machine
FROM python:3.12-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 LUTHIER_DATA_DIR=/data
RUN useradd --create-home --uid 1000 luthier && install -d -o luthier -g luthier -m 0711 /data
WORKDIR /luthier
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY worker worker
COPY migrations migrations
COPY alembic.ini ./
COPY templates templates
COPY static static
COPY samples samples

FROM base AS web
RUN pip install --editable '.[web,s3]'
USER luthier
EXPOSE 8000
CMD ["python", "-m", "uvicorn", "app.main:create_app", "--factory", "--host", "0.0.0.0", "--port", "8000", "--http", "app.web.http_protocol:Guarded", "--no-proxy-headers", "--no-access-log", "--timeout-graceful-shutdown", "5"]

FROM base AS gpu
# Triton and torch's compiler build their kernels with it.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --editable '.[gpu,export,onnx,s3]'
USER luthier
CMD ["python", "-m", "celery", "-A", "worker.main", "worker", "--loglevel", "INFO", "--without-gossip", "--without-mingle", "--without-heartbeat", "-Q", "train,evaluate", "--pool=prefork", "-c", "1", "-n", "train@%h"]
