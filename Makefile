# Start with `make demo` and `make test`. Each target first installs or builds what it needs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= runs/demo
DATA ?= simulated
WORKERS ?= 2
GPUS ?= 0
KEEP ?=
ROLLOUTS ?= 1
TRITONCLIENT ?= 2.73.0
# TORCH=cpu installs torch without CUDA (4 GB) in .venv and in the training image.
TORCH ?= cuda
SEED ?= 0

export RAY_USAGE_STATS_ENABLED := 0
export FEAST_USAGE := False
export RAY_DEDUP_LOGS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: help
help: ## List the targets.
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  %-20s %s\n", $$1, $$2}'

$(STAMP): constraints-hashed.txt pyproject.toml platform/pyproject.toml pipelines/pyproject.toml serving/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Reelway needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python infra/images/dependencies.py --hashed uv >$(VENV)/tools.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $(VENV)/tools.txt
	$(if $(filter cpu,$(TORCH)),$(BIN)/python infra/images/without_cuda.py excluded constraints-hashed.txt >$(VENV)/excluded.txt)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints-hashed.txt --group dev \
		$(if $(filter cpu,$(TORCH)),--excludes $(VENV)/excluded.txt) -e 'platform[cluster]' -e 'pipelines[kafka]' -e 'serving[rank-server]'
	$(if $(filter cpu,$(TORCH)),$(BIN)/python infra/images/without_cuda.py link $(VENV)/lib/python3.*/site-packages)
	@touch $@

.PHONY: install
install: $(STAMP) ## Create .venv and install the three members from constraints-hashed.txt (TORCH=cpu: without CUDA).

.PHONY: system-packages
system-packages: ## Install the servers that integration tests use (Debian or Ubuntu, as root); otherwise list the tests that will be skipped.
	@.ci/system-packages

.PHONY: demo
demo: install ## Run events -> features -> training -> release -> rollouts -> recommendations. Options: ROLLOUTS=0, KEEP=1, DATA=ml-100k DATA_DIR=...
	@$(BIN)/reelway demo --run $(RUN) --data $(DATA) $(if $(DATA_DIR),--data-dir $(DATA_DIR)) \
		--workers $(WORKERS) --gpus $(GPUS) --seed $(SEED) $(if $(KEEP),--keep) \
		$(if $(filter 0,$(ROLLOUTS)),--no-rollouts)

.PHONY: check
check: install ## Run linter, format check, strict type check, import rules and the search for duplicated code.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pylint platform/src pipelines/src serving/src feature_repo infra

.PHONY: test
test: install ## Run all tests except the long ones, with real servers (under 10 minutes on 2 cores).
	$(BIN)/python -m pytest -m "not long and not e2e"

.PHONY: test-long
test-long: install ## Run the long tests: services on Ray Serve under load, killed training workers, Kafka (about 7 minutes).
	$(BIN)/python -m pytest -m long

CLIENTS := build/clients
$(CLIENTS)/.installed: $(STAMP) Makefile
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(CLIENTS)
	$(BIN)/uv pip install --quiet --python $(CLIENTS)/bin/python 'tritonclient[grpc,http]==$(TRITONCLIENT)'
	@touch $@

.PHONY: test-clients
test-clients: $(CLIENTS)/.installed ## Test the rank server with the clients of KServe and Triton, in a separate environment.
	REELWAY_TRITON_PYTHON=$(CURDIR)/$(CLIENTS)/bin/python $(BIN)/python -m pytest tests/serving/test_open_inference_server.py -k foreign_client

# Set KUBECONFIG and REELWAY_CLUSTER_TESTS=1 to use an existing cluster; no node is started then.
OWN_NODE := $(if $(and $(KUBECONFIG),$(REELWAY_CLUSTER_TESTS)),,1)

.PHONY: test-cluster
test-cluster: $(if $(OWN_NODE),cluster,install) ## Test resources, store and operator against a real API server; the node is removed afterwards.
	$(if $(OWN_NODE),trap '$(BIN)/python infra/cluster down' EXIT;) $(BIN)/python -m pytest -m cluster

.PHONY: test-quick
test-quick: install ## Run only the tests that need neither Ray nor a server (about a minute).
	$(BIN)/python -m pytest -m "not slow and not ray and not redis and not kafka and not cluster and not e2e"

.PHONY: bench
bench: bench-simulator bench-features bench-ray-train bench-serving bench-quality bench-closed-loop bench-canary bench-rollout bench-stream bench-parity bench-live bench-live-loop bench-hostile bench-process-life ## Run the benchmarks that need no cluster, one after another (hours), then write BENCHMARKS.md.
	$(MAKE) bench-report

.PHONY: bench-simulator
bench-simulator: install ## Measure simulated impressions per second on one core.
	$(BIN)/python -m tests.benchmarks.bench_simulator

.PHONY: bench-features
bench-features: install ## Measure feature rows per second on 1 and 2 CPUs.
	$(BIN)/python -m tests.benchmarks.bench_features

.PHONY: bench-ray-train
bench-ray-train: install ## Compare an epoch under Ray Train with the same loop without Ray.
	$(BIN)/python -m tests.benchmarks.bench_ray_train

.PHONY: bench-serving
bench-serving: install ## Compare the request path over HTTP with the same arithmetic in one process (17 minutes).
	$(BIN)/python -m tests.benchmarks.bench_serving

.PHONY: bench-quality
bench-quality: install ## Compare the models with popularity and ALS on MovieLens-100K, 3 seeds (REELWAY_ML100K_DIR).
	$(BIN)/python -m tests.benchmarks.bench_quality

.PHONY: bench-closed-loop
bench-closed-loop: install ## Compare watch time per impression with popularity in the simulator, 3 seeds.
	$(BIN)/python -m tests.benchmarks.bench_closed_loop

.PHONY: bench-canary
bench-canary: install ## Simulate error rates and power of the rollout decision, next to the rules of other tools.
	$(BIN)/python -m tests.benchmarks.bench_canary

.PHONY: bench-rollout
bench-rollout: install ## Measure webhook to rollback, failed requests and arm stickiness on a service under load (20 minutes).
	$(BIN)/python -m tests.benchmarks.bench_rollout

.PHONY: bench-stream
bench-stream: install ## Measure outcomes per second and core of the feature stream (BENCH_STREAM: flags).
	$(BIN)/python -m tests.benchmarks.bench_stream $(BENCH_STREAM)

.PHONY: bench-parity
bench-parity: install ## Replay a million served values with the stream on (minutes).
	$(BIN)/python -m tests.benchmarks.bench_parity

.PHONY: bench-live
bench-live: install ## Measure how soon outcomes, uploads, takedowns and trends show in slates, on real Kafka and Redis (15 minutes).
	$(BIN)/python -m tests.benchmarks.bench_live $(BENCH_LIVE)

.PHONY: bench-live-loop
bench-live-loop: install ## Compare watch time per viewer-day of a live and a frozen service over 7 simulated days (BENCH_LIVE_LOOP: flags).
	$(BIN)/python -m tests.benchmarks.bench_live_loop $(BENCH_LIVE_LOOP)

.PHONY: bench-process-life
bench-process-life: install ## Measure how the service ends on SIGTERM and SIGINT to the process and to its group, 20 times each (an hour).
	$(BIN)/python -m tests.benchmarks.bench_process_life $(BENCH_PROCESS_LIFE)

.PHONY: bench-hostile
bench-hostile: install ## Measure what hostile requests and slow clients cost honest viewers (6 minutes).
	$(BIN)/python -m tests.benchmarks.bench_hostile

.PHONY: bench-report
bench-report: install ## Write BENCHMARKS.md from build/bench/*.json.
	$(BIN)/python -m tests.benchmarks.bench_report

.PHONY: cluster-tools
cluster-tools: install ## Build Helm, kubectl, kubeconform and the node's programs from pinned Go modules (9 minutes once).
	@$(BIN)/python infra/cluster build helm coredns kuberay kubernetes

.PHONY: cluster
cluster: install ## Start a one-node Kubernetes with KubeRay, without Docker (needs Debian packages and Go; see infra/cluster).
	@.ci/system-packages cluster
	@$(BIN)/python infra/cluster up

.PHONY: cluster-down
cluster-down: install ## Remove the node with all its processes, mounts, interfaces and iptables chains.
	@$(BIN)/python infra/cluster down

.PHONY: cluster-kserve
cluster-kserve: cluster ## Install KServe's controller and webhooks on the node.
	@$(BIN)/python infra/cluster kserve

# Without access to a registry, use IMAGE_BASE=reelway.local/base:bookworm, which `python infra/images base` creates.
IMAGE_BASE ?=
.PHONY: images
images: install ## Build operator, serving and training images as archives with docker, podman or buildah (TORCH=cpu: small).
	$(BIN)/python infra/images build all --torch $(TORCH) $(if $(IMAGE_BASE),--base $(IMAGE_BASE))

# The node pulls no image: its images are built from this checkout on a Debian base, without CUDA.
NODE_BASE := reelway.local/base:bookworm
.PHONY: cluster-images
cluster-images: install ## Build Reelway's three images for the node with buildah (no registry, no CUDA).
	@.ci/system-packages images
	@$(BIN)/python infra/images base
	$(BIN)/python infra/images build all --torch cpu --base $(NODE_BASE)

.PHONY: cluster-programs
cluster-programs: install ## Build every program of the node from pinned Go modules (10 minutes once).
	@$(BIN)/python infra/cluster build helm coredns kuberay kubernetes prometheus-operator prometheus kserve

.PHONY: cluster-artifacts
cluster-artifacts: cluster-programs cluster-images ## Build everything that `make e2e` needs without starting anything (-j2: in parallel).
	@$(BIN)/python infra/images node monitoring redis kafka

.PHONY: cluster-load-images
cluster-load-images: cluster-images cluster ## Build the images of Reelway from this checkout and load them into the node.
	@$(BIN)/python infra/cluster load .cluster/images/operator.tar .cluster/images/serving.tar .cluster/images/training.tar

.PHONY: cluster-load-servers
cluster-load-servers: cluster-images cluster ## Build images of Kafka and Redis and load them into the node.
	@test -s .cluster/images/kafka.tar -a -s .cluster/images/redis.tar || $(BIN)/python infra/images node redis kafka
	@$(BIN)/python infra/cluster load .cluster/images/redis.tar .cluster/images/kafka.tar

.PHONY: e2e
e2e: $(if $(OWN_NODE),cluster-load-images cluster-load-servers cluster-monitoring cluster-kserve,install) ## Test the platform end to end on a real node: install, roll out, kill, upgrade, uninstall, live parts (35 minutes).
	$(BIN)/python -m pytest -m e2e --durations=25 tests/e2e

.PHONY: bench-cluster
bench-cluster: $(if $(OWN_NODE),cluster,install) ## Measure webhook to rollback over 50 rollouts and recovery from a killed head, on the node.
	$(BIN)/python -m tests.benchmarks.bench_cluster

.PHONY: cluster-monitoring
cluster-monitoring: cluster ## Install Prometheus and Alertmanager on the node, for the monitors and rules of all namespaces.
	@$(BIN)/python infra/cluster build prometheus-operator prometheus
	@test -s .cluster/images/monitoring.tar || $(BIN)/python infra/images node monitoring
	@$(BIN)/python infra/cluster load .cluster/images/monitoring.tar
	@$(BIN)/python infra/cluster monitoring

.PHONY: bench-alerts
bench-alerts: $(if $(OWN_NODE),cluster-monitoring,install) ## Measure the time from fault to rollback through Prometheus and Alertmanager, on the node, 10 runs.
	$(BIN)/python -m tests.benchmarks.bench_alerts

.PHONY: constraints
constraints: install ## Resolve requirements.in into constraints.txt, and its files' hashes into constraints-hashed.txt.
	$(BIN)/uv pip compile requirements.in --output-file constraints.txt --universal --python-version 3.11 \
		--no-annotate --no-header --no-emit-index-url --quiet --upgrade
	$(BIN)/uv pip compile constraints.txt --no-deps --generate-hashes --output-file constraints-hashed.txt --universal \
		--python-version 3.11 --no-annotate --no-header --no-emit-index-url --quiet --upgrade

# Kept apart from .venv, because pip-audit pins libraries that Reelway uses in other versions.
AUDIT := build/audit
PIP_AUDIT ?= 2.10.1
AUDIT_SOURCE ?= osv
$(AUDIT)/.installed: $(STAMP) Makefile
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(AUDIT)
	$(BIN)/uv pip install --quiet --python $(AUDIT)/bin/python 'pip-audit==$(PIP_AUDIT)'
	@touch $@

.PHONY: audit
audit: $(AUDIT)/.installed ## Look up known vulnerabilities of all pinned packages (AUDIT_SOURCE: osv or pypi; needs the internet).
	$(BIN)/python infra/images/audit.py --pip-audit $(AUDIT)/bin/pip-audit --source $(AUDIT_SOURCE) constraints-hashed.txt

.PHONY: clean
clean: ## Remove build output and caches; keep runs/ and .venv.
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
