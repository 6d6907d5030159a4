# Debian's Redis of the machine that builds this, for a test's node: users have their own, or pull Redis' image.
ARG BASE=reelway.local/base:bookworm
FROM ${BASE}
COPY redis-server /usr/bin/
COPY lib/ /usr/local/lib/redis/
ENV LD_LIBRARY_PATH=/usr/local/lib/redis
USER 999:999
WORKDIR /data
