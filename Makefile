# make demo           the whole story on two real models
# make demo REBUILD=1 the same, with the guard made from nothing
# make test           everything CI runs
# make bench          ratios of guarded to unguarded speed
# make setup          install what is missing (cmake, a C++ compiler, libclang)

CARGO ?= cargo
DENY_VERSION := 0.20.2
# Tools of the checks, kept out of the user's own ~/.cargo/bin.
TOOLS := $(CURDIR)/target/tools
PILOTFISH := target/debug/pilotfish

.PHONY: demo test lint deny bench setup build models

demo: build
	$(PILOTFISH) demo $(if $(REBUILD),--rebuild)

build: setup
	$(CARGO) build

setup:
	@scripts/setup.sh

# Tests on real weights fail instead of being skipped: here they must run.
test: lint deny models
	$(CARGO) build --no-default-features
	PILOTFISH_REAL_MODELS=require $(CARGO) test

models: build
	$(PILOTFISH) models pull smollm2-135m-instruct
	$(PILOTFISH) models pull gemma-3-270m

lint: setup
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings
	$(CARGO) clippy --no-default-features --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps

# The advisory database is not asked: it needs the network at every run.
deny: $(TOOLS)/bin/cargo-deny
	$(TOOLS)/bin/cargo-deny check licenses bans sources

$(TOOLS)/bin/cargo-deny:
	$(CARGO) install cargo-deny --version $(DENY_VERSION) --locked --root $(TOOLS)

bench: models
	$(CARGO) bench --profile dev
