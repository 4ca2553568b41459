# slalom as two images. Each has a stage that compiles on Debian 12 and one that holds the programs, the
# demo model and the shared libraries that they load.
#
#   docker build --target cpu -t slalom:cpu .
#   docker run --rm -p 8500:8500 -p 9500:9500 slalom:cpu
#
#   docker build --target cuda -t slalom:cuda .
#   docker run --rm --gpus all -p 8500:8500 -p 9500:9500 slalom:cuda      driver 580 or newer

FROM debian:12 AS tools
WORKDIR /src
COPY scripts scripts
RUN scripts/bootstrap build && rm -rf /var/lib/apt/lists/*

FROM tools AS source
COPY CMakeLists.txt CMakePresets.json ./
COPY proto proto
COPY kernels kernels
COPY model model
COPY scheduler scheduler
COPY server server

FROM source AS build-cpu
RUN cmake --preset cpu -DSLALOM_TESTS=OFF \
    && cmake --build --preset cpu --target slalomd slalom \
    && strip build/cpu/bin/slalomd build/cpu/bin/slalom

# A layer of its own: the toolkit is large and seldom changes.
FROM tools AS toolkit
RUN scripts/bootstrap cuda && rm -rf /var/lib/apt/lists/*

FROM source AS build-cuda
COPY --from=toolkit /src/build/cuda-toolkit build/cuda-toolkit
ENV CUDACXX=/src/build/cuda-toolkit/nvidia/cu13/bin/nvcc
RUN cmake --preset cuda -DSLALOM_TESTS=OFF \
    && cmake --build --preset cuda --target slalomd slalom \
    && strip build/cuda/bin/slalomd build/cuda/bin/slalom

FROM debian:12-slim AS runtime
COPY scripts/packages/runtime.txt /tmp/runtime.txt
RUN apt-get update \
    && grep -v '^#' /tmp/runtime.txt | xargs apt-get install -y --no-install-recommends \
    && rm -rf /var/lib/apt/lists/* /tmp/runtime.txt \
    && useradd --system --uid 10001 --create-home --home-dir /var/lib/slalom slalom
COPY model/demo /usr/local/share/slalom/models/demo
# x264 and gRPC share the cores with the decoder: threads that wait should sleep.
ENV OMP_WAIT_POLICY=passive
EXPOSE 8500 9500
VOLUME /var/lib/slalom
ENTRYPOINT ["slalomd", "--models", "/usr/local/share/slalom/models/demo", "--listen", "0.0.0.0:8500", "--http-listen", "0.0.0.0:9500", "--state-dir", "/var/lib/slalom"]

# The driver's own libraries come from the host, through NVIDIA's container toolkit; CUDA's runtime is
# linked in, and cuBLASLt is all that is left.
FROM runtime AS cuda
COPY --from=toolkit /src/build/cuda-toolkit/nvidia/cu13/lib/libcublasLt.so.13 /usr/local/lib/
RUN ldconfig
COPY --from=build-cuda /src/build/cuda/bin/slalomd /src/build/cuda/bin/slalom /usr/local/bin/
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER slalom

FROM runtime AS cpu
COPY --from=build-cpu /src/build/cpu/bin/slalomd /src/build/cpu/bin/slalom /usr/local/bin/
USER slalom
