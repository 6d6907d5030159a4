#!/bin/sh
# Usage: kafka NAME
# Runs one Kafka broker that clients reach as NAME:9092, with its data under /tmp and the topics of an event log.
set -eu
name=$1
partitions=${PARTITIONS:-4}
settings=/tmp/server.properties
run() { /opt/java/bin/java -Xmx384m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -cp '/opt/kafka/*' "$@"; }
cat >$settings <<SETTINGS
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:9093
listeners=PLAINTEXT://0.0.0.0:9092,CONTROLLER://127.0.0.1:9093
advertised.listeners=PLAINTEXT://$name:9092
controller.listener.names=CONTROLLER
log.dirs=/tmp/data
log.message.timestamp.type=LogAppendTime
num.partitions=$partitions
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
group.initial.rebalance.delay.ms=0
auto.create.topics.enable=true
SETTINGS
run kafka.tools.StorageTool format --ignore-formatted -t q1Sh-9_ISia_zwGINzRvyQ -c $settings
exec /opt/java/bin/java -Xmx384m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -cp '/opt/kafka/*' kafka.Kafka $settings
