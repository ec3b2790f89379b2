# One target a role:  docker build --target api|planner|node|flower|redis .
# Only `node` holds torch. All run as user 10001, on a read-only root file system, writing to /data and /tmp alone.
ARG PYTHON=3.11-slim-bookworm
ARG REDIS=7.2-bookworm

FROM python:${PYTHON} AS base
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PATH=/opt/fairshard/bin:$PATH \
    FAIRSHARD_DATA=/data HOME=/tmp HF_HOME=/data/huggingface REMAP_SIGTERM=SIGQUIT
RUN groupadd --gid 10001 fairshard && useradd --uid 10001 --gid 10001 --no-create-home fairshard \
    && install -d -o 10001 -g 10001 /data /certs /config /joining /authority && python -m venv /opt/fairshard
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY planner planner
COPY workers workers
COPY web web

FROM base AS slim
# huggingface_hub alone of the workers' extra: the metadata store may be a Hub repo.
RUN python -m pip install --no-cache-dir -c constraints.txt ".[queue]" huggingface_hub

FROM slim AS planner
USER 10001:10001
VOLUME /data
CMD ["celery", "-A", "workers.celery_app", "worker", "-Q", "planner", "-n", "planner@%h", "-c", "1", "--loglevel", "INFO"]

FROM slim AS web
RUN python -m pip install --no-cache-dir -c constraints.txt ".[queue,web]"

FROM web AS api
USER 10001:10001
VOLUME /data
EXPOSE 8080
CMD ["gunicorn", "-c", "python:web.gunicorn_conf", "--no-control-socket", "web.wsgi:app"]

FROM web AS flower
USER 10001:10001
EXPOSE 5555
CMD ["celery", "-A", "workers.celery_app", "flower", "--address=0.0.0.0", "--port=5555", "--tasks_columns=name,args,state,result,received,runtime,worker,uuid"]

FROM base AS node
# An index with the torch build that you want, without CUDA or with that of your machines; empty: PyPI's, with CUDA.
ARG TORCH_INDEX=
RUN python -m pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} -c constraints.txt ".[queue,workers]"
USER 10001:10001
VOLUME /data
CMD ["fairshard", "node"]

FROM redis:${REDIS} AS redis
RUN install -d -o 10001 -g 10001 /data /certs
COPY deploy/redis.sh /usr/local/bin/fairshard-redis
USER 10001:10001
VOLUME /data
EXPOSE 6379
ENTRYPOINT ["sh", "/usr/local/bin/fairshard-redis"]
