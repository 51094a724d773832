# coresift with the versions of constraints.txt, for Kubernetes (jobs/kuberay.yaml) or by hand:
#
#     docker build -t coresift .
#     docker run --rm --gpus all --shm-size 8g -v "$PWD/work:/work" -w /work coresift coresift --help
#
# torch brings CUDA's libraries; the driver is the host's (NVIDIA's container toolkit), 580 or newer.
FROM python:3.11-slim

# wget: Kubernetes asks Ray's processes with it whether they are well; g++: torch.compile and DeepSpeed build with it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home ray

WORKDIR /opt/coresift
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY engine engine
COPY cli cli
COPY jobs jobs
RUN pip install --no-cache-dir -c constraints.txt -e .

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    RAY_USAGE_STATS_ENABLED=0

USER 1000
CMD ["coresift", "--help"]
