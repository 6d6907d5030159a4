# Prometheus, Alertmanager and the sidecar that reloads them, for a test's node: what infra/cluster built, and Debian's
# Alertmanager of the machine that builds this. Nobody is shipped this image.
ARG BASE=reelway.local/base:bookworm
FROM ${BASE}
COPY prometheus prometheus-config-reloader prometheus-alertmanager /usr/bin/
COPY default.tmpl email.tmpl /usr/share/prometheus/alertmanager/
USER 65534:65534
WORKDIR /tmp
