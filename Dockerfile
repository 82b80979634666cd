# wsproxy in a container. The default target is the service; `--target tests` adds the end-to-end tests.
# What runs here is the `start` task of deno.json, with the hosts of its network permission named: see
# scripts/container_start.sh.
ARG DENO_VERSION=2.9.6

FROM denoland/deno:${DENO_VERSION} AS service
# Nothing is fetched when it starts, nor does Deno look for a newer version of itself.
ENV DENO_NO_UPDATE_CHECK=1 NO_COLOR=1
# WORKDIR makes a folder of root's, and `deno ci` writes into it.
RUN mkdir /app && chown deno:deno /app
WORKDIR /app
USER deno

# A layer of their own: as long as these two files stay, so does the layer.
COPY --chown=deno:deno deno.json deno.lock ./
RUN ["deno", "ci", "--prod", "--skip-types"]

COPY --chown=deno:deno main.ts ./
COPY --chown=deno:deno src/ src/
COPY --chown=deno:deno scripts/container_start.sh scripts/start_flags.ts scripts/
# TypeScript is compiled now: the file system is read-only later. Without a network, to prove that `deno ci` got all.
RUN --network=none deno cache --frozen main.ts src/worker.ts src/cli/*.ts \
  && deno run --allow-read=deno.json scripts/start_flags.ts > start.flags

EXPOSE 8080
# /health asks Redis too. Where an unhealthy container is replaced at once (Docker Swarm does that), check /ready
# instead: a restart does not bring Redis back, and it cuts off every client.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --start-interval=1s --retries=3 \
  CMD ["sh", "scripts/container_start.sh", "health"]
CMD ["sh", "scripts/container_start.sh"]


FROM service AS tests
COPY --chown=deno:deno tests/ tests/
COPY --chown=deno:deno scripts/failover_load.ts scripts/
RUN --network=none deno cache --frozen tests/e2e_test.ts scripts/failover_load.ts
HEALTHCHECK NONE
CMD ["deno", "test", "--no-prompt", "--frozen", "--cached-only", "--no-check", "--sanitize-ops", "--sanitize-resources", \
  "--allow-net", "--allow-env", "--allow-read=/app", "--allow-sys=hostname", "tests/e2e_test.ts"]


FROM service
ARG VERSION=dev
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="wsproxy" \
  org.opencontainers.image.description="WebSocket proxy in front of Redis Pub/Sub" \
  org.opencontainers.image.licenses="MIT" \
  org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${REVISION}" \
  org.opencontainers.image.source="${SOURCE}"
