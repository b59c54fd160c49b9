# Both stages on the same base: the environment that is built finds the same interpreter where it runs.
FROM python:3.13-slim-trixie AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY proxy ./proxy
COPY config ./config
RUN python -m venv /opt/vast-proxy \
 && /opt/vast-proxy/bin/pip install --no-cache-dir . \
 && /opt/vast-proxy/bin/pip uninstall --yes --quiet pip

FROM python:3.13-slim-trixie
COPY --from=build /opt/vast-proxy /opt/vast-proxy
# 0.0.0.0 is what Docker lets in. It wants VAST_PROXY_ALLOW_OPEN=true or a team: to open it is up to whoever runs it.
# What was learned about the limits is kept in the volume; nothing is written anywhere else.
RUN install -d -o 10001 -g 10001 -m 0700 /var/lib/vast-proxy
ENV PATH="/opt/vast-proxy/bin:${PATH}" \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    XDG_STATE_HOME=/var/lib \
    VAST_PROXY_LISTEN=0.0.0.0:8080
USER 10001:10001
VOLUME /var/lib/vast-proxy
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8080/_proxy/health', timeout=2)"]
ENTRYPOINT ["vast-proxy"]
CMD ["serve"]
