# make quickstart | test | fuzz | lint | findings | curve | bench | gpu | pins | clean. Each makes .venv from the pinned requirements if needed.
PYTHON ?= python3
BIN := .venv/bin
# SEED=n: the same with another world and other first weights, in a folder of its own.
QUICK := out/quickstart$(if $(SEED),-$(SEED))
OTHER = $(if $(SEED),--run.seed=$(SEED) --data.path=$(QUICK)/data)

.PHONY: quickstart test fuzz lint findings curve bench gpu pins clean
.DELETE_ON_ERROR:

.venv/runtime: requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; give it as PYTHON=python3.x")'
	@echo "setting up .venv (a few minutes on the first call)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@touch $@

# Set-up, data, pretraining, instruction tuning, comparison. Interrupted, it goes on where it was.
quickstart: .venv/runtime
	$(BIN)/python -m data.prepare world --seed $(or $(SEED),1) --out $(QUICK)/data
	$(BIN)/python train_pretrain.py --config configs/quickstart/pretrain.toml --run.dir=$(QUICK)/base $(OTHER)
	$(BIN)/python train_sft.py --config configs/quickstart/sft.toml --base=$(QUICK)/base --run.dir=$(QUICK)/instruct $(OTHER)
	$(BIN)/python -m lab.report --base $(QUICK)/base --instruct $(QUICK)/instruct --out $(QUICK)

# A process a core, each of one thread; a file goes to one of them, since some hold to an order.
test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# Broken inputs of each kind and command lines by the thousand (`make test` has 500): FUZZ=n of them,
# FUZZ_SEED=n others.
fuzz: .venv/dev
	FUZZ=$(or $(FUZZ),10000) $(BIN)/python -m pytest tests/test_fuzz.py tests/test_fuzz_commands.py

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Everything that docs/findings.md reports, from nothing: about a day of one core. It goes on
# where it was interrupted. SWEEPS="rates order" runs these alone.
findings: .venv/runtime
	$(BIN)/python -m lab.findings $(SWEEPS)

# When in the quickstart's pretraining a fact becomes completable, readable by a probe and, after tuning,
# answerable: about three and a half hours of one core. It goes on where it was interrupted. SEEDS="3" is one seed.
SEEDS ?= 3 4 5
PRETRAIN = $(BIN)/python train_pretrain.py --config configs/quickstart/pretrain.toml --run.seed=$$seed \
  --data.path=out/curve/$$seed/data
CURVE = $(BIN)/python -m lab.curve knowledge probes --seeds $(SEEDS) \
  --tune configs/quickstart/sft.toml run.seed={seed} data.path=out/curve/{seed}/data run.save_every=1000 --figures \
    completed=knowledge.base.cloze.held_out.all "completed, known people=knowledge.base.cloze.known.all" \
    "completed, unseen people=knowledge.base.cloze.unseen.all" \
    "read before the value=probes.base.places.cloze.-1.rank" "read at the name=probes.base.places.name.0.rank" \
    "answered after tuning=knowledge.instruct.answers.held_out.answered.all" \
    "answered, known people=knowledge.instruct.answers.known.answered.all" \
    "answered, unseen people=knowledge.instruct.answers.unseen.answered.all"
curve: .venv/runtime
	for seed in $(SEEDS); do \
	  $(BIN)/python -m data.prepare world --seed $$seed --out out/curve/$$seed/data && \
	  $(PRETRAIN) --run.dir=out/curve/$$seed/base --run.save_every=100 && \
	  $(PRETRAIN) --run.dir=out/curve/$$seed/decayed --run.save_every=600 --optim.steps=600 || exit; done
	$(CURVE) --run out/curve/{seed}/base --out out/curve --steps 200 300 400 500 600 1200
	$(CURVE) --run out/curve/{seed}/decayed --out out/curve/decayed
	# then, for docs/findings.md: python -m lab.findings --curve out/curve out/curve/decayed

# PEERS="--nanogpt DIR --nanochat DIR" measures beside them; docs/speed.md has the benches one by one.
bench: .venv/dev
	$(BIN)/python -m bench train $(PEERS)
	$(BIN)/python -m bench sample $(PEERS)
	$(BIN)/python -m bench sft
	$(BIN)/python -m bench table

# On a machine with a GPU, all that is to be shown there, in about ten minutes; PEERS as above.
gpu: .venv/dev
	$(BIN)/python -m bench gpu $(PEERS); code=$$?; $(BIN)/python -m bench table; exit $$code

# constraints.txt anew: of all that the requirements need, the newest that they allow.
pins:
	rm -rf out/pins
	$(PYTHON) -m venv out/pins
	out/pins/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	out/pins/bin/python -m pip freeze | sed 's/+[a-z0-9.]*$$//' > constraints.txt
	rm -rf out/pins

clean:
	rm -rf out
