# make demo: set up and run the main job. make test: set up and run the tests.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.installed

.PHONY: setup demo test test-all lint format clean

setup: $(SETUP)

$(SETUP): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@touch $@

# Both models see the same images. The ViT cuts the 32 pixels into 4 x 4 patches and averages its weights.
demo: $(SETUP)
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml train.py --model cnn --dataset digits \
		--recipe reference --augment none --epochs 12 --best-metric loss --output-dir demo
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml train.py --model vit_scratch --dataset digits \
		--recipe reference --patch-size 8 --ema 0.98 --epochs 20 --best-metric loss --output-dir demo
	$(BIN)/python evaluate.py --ckpt demo/checkpoints/cnn_best.safetensors demo/checkpoints/vit_scratch_best.safetensors \
		--output-dir demo

test: $(SETUP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: $(SETUP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo .pytest_cache .ruff_cache
