"""Runs made of trained models: ensembles, and sequence models, which diagnose whole scans.

    python -m utils.diagnosis ensemble --fold 0                every form of ensemble of one fold
    python -m utils.diagnosis sequence --profile cpu --fold 0  every sequence model of one fold

Names of `utils.pipeline` that notebooks use are importable from here.
"""

from utils.pipeline.diagnosis_command import main, protocols_of, run_available
from utils.pipeline.ensembles import run_ensemble
from utils.pipeline.scans import run_sequence

__all__ = ["protocols_of", "run_available", "run_ensemble", "run_sequence"]

if __name__ == "__main__":
    main()
