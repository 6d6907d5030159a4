# Kafka (KRaft, one broker) on the Java runtime of the machine that builds this, for a test's node: users have their own.
ARG BASE=reelway.local/base:bookworm
FROM ${BASE}
COPY java/ /opt/java/
COPY jars/ /opt/kafka/
COPY kafka.sh /usr/bin/kafka
USER 65534:65534
WORKDIR /tmp
