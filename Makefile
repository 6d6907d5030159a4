# Everything a newcomer needs: `make demo`, `make test`. Each target sets up what it stands on.
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
# cpu: torch without CUDA's four gigabytes, in .venv and in the training image.
TORCH ?= cuda
SEED ?= 0

export RAY_USAGE_STATS_ENABLED := 0
export FEAST_USAGE := False
export RAY_DEDUP_LOGS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: help
help: ## List the targets.
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  %-20s %s\n", $$1, $$2}'

$(STAMP): constraints.txt pyproject.toml platform/pyproject.toml pipelines/pyproject.toml serving/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Reelway needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(if $(filter cpu,$(TORCH)),$(BIN)/python infra/images/without_cuda.py excluded constraints.txt >$(VENV)/excluded.txt)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --group dev \
		$(if $(filter cpu,$(TORCH)),--excludes $(VENV)/excluded.txt) -e 'platform[cluster]' -e pipelines -e serving
	$(if $(filter cpu,$(TORCH)),$(BIN)/python infra/images/without_cuda.py link $(VENV)/lib/python3.*/site-packages)
	@touch $@

.PHONY: install
install: $(STAMP) ## Make .venv and install the three members from constraints.txt (TORCH=cpu: without CUDA).

.PHONY: system-packages
system-packages: ## Install the servers that integration tests use (Debian or Ubuntu, as root); says so where it cannot.
	@.ci/system-packages

.PHONY: demo
demo: install ## Events -> features -> training -> release -> rollouts -> recommendations. ROLLOUTS=0, DATA=ml-100k DATA_DIR=..., KEEP=1.
	@$(BIN)/reelway demo --run $(RUN) --data $(DATA) $(if $(DATA_DIR),--data-dir $(DATA_DIR)) \
		--workers $(WORKERS) --gpus $(GPUS) --seed $(SEED) $(if $(KEEP),--keep) \
		$(if $(filter 0,$(ROLLOUTS)),--no-rollouts)

.PHONY: check
check: install ## Lint, format check, strict types, import rules.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: test
test: install ## All tests but the long ones, real servers included (under 10 minutes on 2 cores).
	$(BIN)/python -m pytest -m "not long and not e2e"

.PHONY: test-long
test-long: install ## Whole services on Ray Serve under load, killed training workers (about 5 minutes).
	$(BIN)/python -m pytest -m long

CLIENTS := build/clients
$(CLIENTS)/.installed: $(STAMP) Makefile
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(CLIENTS)
	$(BIN)/uv pip install --quiet --python $(CLIENTS)/bin/python 'tritonclient[grpc,http]==$(TRITONCLIENT)'
	@touch $@

.PHONY: test-clients
test-clients: $(CLIENTS)/.installed ## KServe's own client and Triton's, in an environment of its own, against the rank server.
	REELWAY_TRITON_PYTHON=$(CURDIR)/$(CLIENTS)/bin/python $(BIN)/python -m pytest tests/serving/test_open_inference_server.py -k that_others_wrote

# Whoever has a cluster names it by KUBECONFIG and REELWAY_CLUSTER_TESTS=1; no node is brought up then.
OWN_NODE := $(if $(and $(KUBECONFIG),$(REELWAY_CLUSTER_TESTS)),,1)

.PHONY: test-cluster
test-cluster: $(if $(OWN_NODE),cluster,install) ## Resources, store and operator against a real API server; the node is taken down afterwards.
	$(if $(OWN_NODE),trap '$(BIN)/python infra/cluster down' EXIT;) $(BIN)/python -m pytest -m cluster

.PHONY: test-quick
test-quick: install ## Only what needs neither Ray nor a server: about a minute.
	$(BIN)/python -m pytest -m "not slow and not ray and not redis and not cluster and not e2e"

.PHONY: bench
bench: bench-simulator bench-features bench-ray-train bench-serving bench-quality bench-closed-loop bench-canary bench-rollout ## Every number in the README, one after another.

.PHONY: bench-simulator
bench-simulator: install ## Simulated impressions per second on one core.
	$(BIN)/python -m tests.benchmarks.bench_simulator

.PHONY: bench-features
bench-features: install ## Feature rows per second at 1 and 2 CPUs.
	$(BIN)/python -m tests.benchmarks.bench_features

.PHONY: bench-ray-train
bench-ray-train: install ## Ray Train against the same loop without Ray.
	$(BIN)/python -m tests.benchmarks.bench_ray_train

.PHONY: bench-serving
bench-serving: install ## The graph over HTTP against the same arithmetic in one process.
	$(BIN)/python -m tests.benchmarks.bench_serving

.PHONY: bench-quality
bench-quality: install ## MovieLens-100K against popularity and ALS, 3 seeds (REELWAY_ML100K_DIR).
	$(BIN)/python -m tests.benchmarks.bench_quality

.PHONY: bench-closed-loop
bench-closed-loop: install ## Watch time per impression against popularity in the simulator, 3 seeds.
	$(BIN)/python -m tests.benchmarks.bench_closed_loop

.PHONY: bench-canary
bench-canary: install ## Error rates and power of the rollout decision, simulated, beside other tools' rules.
	$(BIN)/python -m tests.benchmarks.bench_canary

.PHONY: bench-rollout
bench-rollout: install ## Webhook to stable, failed requests, sticky arms: on the running service under load (20 minutes).
	$(BIN)/python -m tests.benchmarks.bench_rollout

.PHONY: cluster-tools
cluster-tools: install ## Build helm, kubectl, kubeconform and the node's programs from pinned Go modules (9 minutes once).
	@$(BIN)/python infra/cluster build helm coredns kuberay kubernetes

.PHONY: cluster
cluster: install ## A real one-node Kubernetes with KubeRay, without Docker (Debian packages and Go; see infra/cluster).
	@.ci/system-packages cluster
	@$(BIN)/python infra/cluster up

.PHONY: cluster-down
cluster-down: install ## Remove the node: every process, mount, interface and chain of it.
	@$(BIN)/python infra/cluster down

.PHONY: cluster-kserve
cluster-kserve: cluster ## KServe's own controller on the node, with its webhooks.
	@$(BIN)/python infra/cluster kserve

# Where no registry is reached: IMAGE_BASE=reelway.local/base:bookworm, made by `python infra/images base`.
IMAGE_BASE ?=
.PHONY: images
images: install ## Operator, serving and training images by docker, podman or buildah, as archives (TORCH=cpu for a small one).
	$(BIN)/python infra/images build all --torch $(TORCH) $(if $(IMAGE_BASE),--base $(IMAGE_BASE))

# What the node runs where nothing is pulled, each from what lies here and in the index: no registry, no CUDA.
NODE_BASE := reelway.local/base:bookworm
.PHONY: cluster-images
cluster-images: install ## Reelway's three images for the node, as archives by buildah on a Debian base: no registry, no CUDA.
	@.ci/system-packages images
	@$(BIN)/python infra/images base
	$(BIN)/python infra/images build all --torch cpu --base $(NODE_BASE)

.PHONY: cluster-programs
cluster-programs: install ## Every program of the node from pinned Go modules (10 minutes once).
	@$(BIN)/python infra/cluster build helm coredns kuberay kubernetes prometheus-operator prometheus kserve

.PHONY: cluster-parts
cluster-parts: cluster-programs cluster-images ## All that `make e2e` needs, and nothing started: the minutes before it, once (-j2: at once).
	@$(BIN)/python infra/images node monitoring redis

.PHONY: cluster-load
cluster-load: cluster-images cluster ## Give the node Reelway's images, built from the code as it is.
	@$(BIN)/python infra/cluster load .cluster/images/operator.tar .cluster/images/serving.tar .cluster/images/training.tar

.PHONY: e2e
e2e: $(if $(OWN_NODE),cluster-load cluster-monitoring cluster-kserve,install) ## The whole platform on a real node: install, roll out, kill, upgrade, uninstall (25 minutes).
	$(BIN)/python -m pytest -m e2e --durations=25 tests/e2e

.PHONY: bench-cluster
bench-cluster: $(if $(OWN_NODE),cluster,install) ## On the node: webhook to stable over 50 rollouts, a killed head with and without a GCS store.
	$(BIN)/python -m tests.benchmarks.bench_cluster

.PHONY: cluster-monitoring
cluster-monitoring: cluster ## Prometheus and Alertmanager on the node, which take every namespace's monitors, rules and routes.
	@$(BIN)/python infra/cluster build prometheus-operator prometheus
	@test -s .cluster/images/monitoring.tar || $(BIN)/python infra/images node monitoring
	@$(BIN)/python infra/cluster load .cluster/images/monitoring.tar
	@$(BIN)/python infra/cluster monitoring

.PHONY: bench-alerts
bench-alerts: $(if $(OWN_NODE),cluster-monitoring,install) ## On the node: fault to stable through Prometheus and Alertmanager, 10 runs, the share of each hop.
	$(BIN)/python -m tests.benchmarks.bench_alerts

.PHONY: constraints
constraints: install ## Resolve requirements.in into constraints.txt again.
	$(BIN)/uv pip compile requirements.in --output-file constraints.txt --universal --python-version 3.11 \
		--no-annotate --no-header --no-emit-index-url --quiet --upgrade

.PHONY: clean
clean: ## Remove build output and caches; runs/ and .venv stay.
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
