# The rollout operator, the catalogue API and the command line for clusters. It contains neither torch nor Ray.
# The default base is an official image; `python infra/images base` builds one for machines without a registry.
ARG BASE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

# The installer and the list of requirements. All images share the caches.
FROM ${BASE} AS installer
WORKDIR /build
RUN python3 -m venv /build/pip && python3 -m venv --without-pip /opt/reelway \
    && echo /opt/members > "$(echo /opt/reelway/lib/python3.*/site-packages)/members.pth"
COPY constraints-hashed.txt infra/images/dependencies.py infra/images/install_dependencies.sh ./
ENV PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1
RUN --mount=type=cache,id=reelway-pip,target=/var/cache/pip \
    --mount=type=secret,id=ca,required=false \
    --mount=type=secret,id=pip,required=false \
    sh install_dependencies.sh tools
COPY platform/pyproject.toml platform/
ARG MEMBERS="platform[cluster,kafka,s3]"
RUN python3 dependencies.py ${MEMBERS} > requirements.txt && cp requirements.txt constraints-hashed.txt /opt/reelway/

FROM installer AS members
COPY platform/ platform/
RUN pip/bin/pip wheel -q --no-deps --no-build-isolation --no-index --wheel-dir wheels ./platform \
    && pip/bin/pip --python /opt/reelway/bin/python install -q --no-deps --no-index --target /opt/members wheels/*.whl

FROM ${BASE}
RUN echo 'reelway:x:10001:10001::/tmp:/usr/sbin/nologin' >> /etc/passwd && echo 'reelway:x:10001:' >> /etc/group
# The large layer. It changes only with constraints-hashed.txt and the members' requirements.
COPY --from=installer /opt/reelway /opt/reelway
RUN --mount=type=bind,from=installer,source=/build,target=/build \
    --mount=type=cache,id=reelway-uv,target=/var/cache/uv \
    --mount=type=secret,id=ca,required=false \
    --mount=type=secret,id=pip,required=false \
    sh /build/install_dependencies.sh requirements
COPY --from=members /opt/members /opt/members
ENV PATH=/opt/members/bin:/opt/reelway/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 10001:10001
WORKDIR /tmp
ENTRYPOINT ["reelway"]
CMD ["operator"]
