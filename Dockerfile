# slalom in two stages: `build` compiles on Debian 12, `cpu` holds the programs, the demo model and
# the shared libraries that they load.
#
#   docker build --target cpu -t slalom:cpu .
#   docker run --rm -p 8500:8500 -p 9500:9500 slalom:cpu

FROM debian:12 AS build
WORKDIR /src
COPY scripts scripts
RUN scripts/bootstrap build && rm -rf /var/lib/apt/lists/*
COPY CMakeLists.txt CMakePresets.json ./
COPY proto proto
COPY kernels kernels
COPY model model
COPY scheduler scheduler
COPY server server
RUN cmake --preset cpu -DSLALOM_TESTS=OFF \
    && cmake --build --preset cpu --target slalomd slalom \
    && strip build/cpu/bin/slalomd build/cpu/bin/slalom

FROM debian:12-slim AS cpu
COPY scripts/packages/runtime.txt /tmp/runtime.txt
RUN apt-get update \
    && grep -v '^#' /tmp/runtime.txt | xargs apt-get install -y --no-install-recommends \
    && rm -rf /var/lib/apt/lists/* /tmp/runtime.txt \
    && useradd --system --uid 10001 --create-home --home-dir /var/lib/slalom slalom
COPY --from=build /src/build/cpu/bin/slalomd /src/build/cpu/bin/slalom /usr/local/bin/
COPY model/demo /usr/local/share/slalom/models/demo
# x264 and gRPC share the cores with the decoder: threads that wait should sleep.
ENV OMP_WAIT_POLICY=passive
USER slalom
EXPOSE 8500 9500
VOLUME /var/lib/slalom
ENTRYPOINT ["slalomd", "--models", "/usr/local/share/slalom/models/demo", "--listen", "0.0.0.0:8500", "--http-listen", "0.0.0.0:9500", "--state-dir", "/var/lib/slalom"]
