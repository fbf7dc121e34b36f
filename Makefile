# make demo           the whole story on two real models
# make demo REBUILD=1 the same, with the guard made from nothing
# make test           everything CI runs
# make test-vulkan    the tests on a GPU by Vulkan, or on Vulkan's software driver; installs what is missing
# make test-cuda      the tests on an NVIDIA GPU
# make test-clients   the server, asked by OpenAI's own client, LiteLLM's proxy and LangChain
# make test-dashboard the server's page, in a headless Chromium
# make test-deployment  the files in packaging/: nginx in front of real servers, the unit, the container's file, the alerts
# make attach         the library that `pilotfish attach` loads into apps
# make install        the command, the library and its header under PREFIX (/usr/local); make install-library without the command
# make vulkan-driver  what runs programs on a GPU by Vulkan, or on Vulkan's software driver
# make llama-server   llama.cpp's own server, which guards are attached to in tests and `pilotfish serve` is compared with
# make soak-attach    that server with a guard attached, under 32 clients while the guard is rewritten, five minutes
# make soak           the server under 32 clients while a guard is rewritten, ten minutes
# make bench-server   the server's throughput beside llama.cpp's own
# make bench-attach   the speed of an app with guards attached beside the same app alone
# make bench          ratios of guarded to unguarded speed
# make setup          install what is missing (cmake, a C++ compiler, libclang)

CARGO ?= cargo
DENY_VERSION := 0.20.2
# Tools of the checks, kept out of the user's own ~/.cargo/bin.
TOOLS := $(CURDIR)/target/tools
PILOTFISH := target/debug/pilotfish

.PHONY: demo test attach attached-app portable-attach llama-cpp-python install install-library vulkan-driver llama-server bench-attach soak-attach test-clients test-dashboard test-deployment soak bench-server test-vulkan test-cuda lint deny bench setup build models reference

demo: build
	$(PILOTFISH) demo $(if $(REBUILD),--rebuild)

build: setup
	$(CARGO) build

setup:
	@scripts/setup.sh

# Tests on real weights fail instead of being skipped: here they must run. One thread for each model: there are as many tests at once as cores, and threads
# that wait for each other at every product, where others have the core, make a test of seconds one of minutes. One runs again with all threads.
test: lint deny models reference attach portable-attach attached-app vulkan-driver llama-server llama-cpp-python
	$(CARGO) test -p pilotfish-attach
	OMP_THREAD_LIMIT=1 PILOTFISH_REAL_MODELS=require $(CARGO) test
	PILOTFISH_REAL_MODELS=require $(CARGO) test --test suite -- real::reading_changes_no_bit_of_the_logits

# The library that `pilotfish attach` loads, beside the command. By itself: in one build with the command it would be given llama.cpp, which it must not have.
attach: setup
	$(CARGO) build -p pilotfish-attach

# The same for any machine of its kind: valgrind, under which a test runs it, does not know the instructions of the newest.
portable-attach: setup
	@scripts/setup-native-tests.sh
	CARGO_TARGET_DIR=$(TOOLS)/portable RUSTFLAGS="-C target-cpu=generic" $(CARGO) build -p pilotfish-attach

# For this machine, as `make build` does (.cargo/config.toml). DESTDIR is put before all paths, for those who make packages.
PREFIX ?= /usr/local
install: setup install-library
	$(CARGO) build --release
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin target/release/pilotfish

# LIBRARY is one that is there already.
install-library:
ifndef LIBRARY
	$(CARGO) build --release -p pilotfish-attach
endif
	install -D -m 755 $(or $(LIBRARY),target/release/libpilotfish_attach.so) $(DESTDIR)$(PREFIX)/lib/libpilotfish_attach.so
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/include include/pilotfish.h
	install -d $(DESTDIR)$(PREFIX)/lib/pkgconfig
	sed 's|@PREFIX@|$(PREFIX)|; s|@VERSION@|$(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)|' packaging/pkgconfig/pilotfish.pc.in > $(DESTDIR)$(PREFIX)/lib/pkgconfig/pilotfish.pc

# An app to attach it to.
attached-app:
	@scripts/setup-attached-app.sh $(TOOLS)/attach

# For the attached app on a GPU. Mesa's software driver keeps the shaders that it has compiled in the user's own cache, which saves most of a minute.
vulkan-driver:
	@scripts/setup-vulkan.sh $(TOOLS)/vulkan-run run

# A folder for each: another feature compiles llama.cpp anew. Vulkan takes no software driver that is not asked for by its number. What a test keeps
# on the CPU stays there: llama.cpp would send large batches to the GPU all the same, whose products are less exact. One thread, since each test has
# models of its own on the one device.
GPU_TEST = GGML_OP_OFFLOAD_MIN_BATCH=1000000 CARGO_TARGET_DIR=$(CURDIR)/target/$(1) $(2) $(CARGO) test --features $(1) --test suite -- --test-threads 1

test-vulkan: setup
	@scripts/setup-vulkan.sh $(TOOLS)/vulkan
	. $(TOOLS)/vulkan/environment && $(call GPU_TEST,vulkan,GGML_VK_VISIBLE_DEVICES=$(or $(GGML_VK_VISIBLE_DEVICES),0))

test-cuda:
	$(call GPU_TEST,cuda,)

test-clients: models $(TOOLS)/clients/installed
	PILOTFISH=$(PILOTFISH) $(TOOLS)/clients/bin/python -m pytest -q tests/clients

# Chromium is the system's, or CHROMIUM.
test-dashboard: models $(TOOLS)/dashboard/installed
	PILOTFISH=$(PILOTFISH) $(TOOLS)/dashboard/bin/python -m pytest -q tests/dashboard

# What is not installed of nginx, promtool and systemd is skipped, and told.
test-deployment: models $(TOOLS)/deployment/installed
	PATH="$(TOOLS)/deployment/bin:$$PATH" PILOTFISH=$(PILOTFISH) $(TOOLS)/deployment/bin/python -m pytest -q -rs tests/deployment

# What the Python of a folder of tests/ needs.
$(TOOLS)/%/installed: tests/%/requirements.txt
	python3 -m venv $(TOOLS)/$*
	$(TOOLS)/$*/bin/pip install -q -r $<
	touch $@

# Of the source of a crate that is there once `pilotfish` is built.
llama-server: build
	@scripts/setup-llama-server.sh $(TOOLS)/llama-server

# An app that is attached to, and what an example is written for: with the libraries of `llama-server`.
llama-cpp-python:
	@scripts/setup-llama-cpp-python.sh $(TOOLS)/llama-cpp-python

bench-server: models llama-server
	python3 tests/clients/throughput.py --pilotfish $(PILOTFISH) --llama-server $(TOOLS)/llama-server/bin/llama-server --guards guards/harm-gate-gemma3-to-smollm2

bench-attach: models attach attached-app
	for threads in 1 2; do python3 tests/attach/speed.py --pilotfish $(PILOTFISH) --node-llama-cpp $(TOOLS)/attach/node_modules/node-llama-cpp/dist/index.js \
	    --model smollm2-135m-instruct --guard guards/harm-gate-gemma3-to-smollm2 --threads $$threads; done

soak: models
	python3 tests/clients/soak.py --pilotfish $(PILOTFISH) --model smollm2-135m-instruct --guard guards/refusal-smollm2 --seconds 600

soak-attach: models attach llama-server
	python3 tests/attach/soak.py --pilotfish $(PILOTFISH) --llama-server $(TOOLS)/llama-server/bin/llama-server --seconds 300

models: build
	$(PILOTFISH) models pull smollm2-135m-instruct
	$(PILOTFISH) models pull gemma-3-270m

# numpy, for the Python that the numbers are compared with.
reference:
	@scripts/setup-reference.sh $(TOOLS)/reference

lint: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --all-targets -- -D warnings
	$(CARGO) clippy --no-default-features --all-targets -- -D warnings
	$(CARGO) clippy -p pilotfish-attach --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps

# The advisory database is not asked: it needs the network at every run. The tool runs for a second, so it is compiled unoptimised.
deny: $(TOOLS)/bin/cargo-deny
	$(TOOLS)/bin/cargo-deny check licenses bans sources

$(TOOLS)/bin/cargo-deny:
	$(CARGO) install cargo-deny --version $(DENY_VERSION) --locked --debug --root $(TOOLS)

bench: models
	$(CARGO) bench --profile dev
