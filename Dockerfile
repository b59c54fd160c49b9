# Both stages on the same base: the environment that is built finds the same interpreter where it runs. The tag is a full
# version, but tags can be moved: for the very same bytes each time, build with  --build-arg BASE=python@sha256:...
ARG BASE=python:3.13.14-slim-trixie

FROM ${BASE} AS build
# For traces:  --build-arg EXTRAS=[otel]
ARG EXTRAS=""
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY deploy/constraints.txt ./deploy/
COPY config ./config
COPY proxy ./proxy
# The last line finds what was installed and is not pinned.
RUN python -m venv /opt/vast-proxy \
 && /opt/vast-proxy/bin/pip install --no-cache-dir --constraint deploy/constraints.txt ".${EXTRAS}" \
 && /opt/vast-proxy/bin/pip freeze --exclude vast-proxy > installed.txt \
 && /opt/vast-proxy/bin/pip uninstall --yes --quiet pip \
 && ! grep -vxF -f deploy/constraints.txt installed.txt

FROM ${BASE}
ARG BASE
LABEL org.opencontainers.image.title="vast-proxy" \
      org.opencontainers.image.description="A reverse proxy that gets unmodified Vast.ai clients through the API's rate limits" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.base.name="${BASE}"
# It belongs to root, and whoever runs it cannot change it.
COPY --from=build /opt/vast-proxy /opt/vast-proxy
# What was learned, the journal of writes and the day's spends are kept in the volume; nothing is written anywhere else.
RUN install -d -o 10001 -g 10001 -m 0700 /var/lib/vast-proxy
# 0.0.0.0 is what Docker lets in. It wants VAST_PROXY_ALLOW_OPEN=true or a team: to open it is up to whoever runs it.
ENV PATH="/opt/vast-proxy/bin:${PATH}" \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    XDG_STATE_HOME=/var/lib \
    VAST_PROXY_LISTEN=0.0.0.0:8080
# By number, so that an orchestrator can tell that it is not root.
USER 10001:10001
VOLUME /var/lib/vast-proxy
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=20s --timeout=5s --start-period=10s --retries=3 CMD ["vast-proxy", "health"]
ENTRYPOINT ["vast-proxy"]
CMD ["serve"]
