"""The jobs: prepare, pretrain, export, evaluate, search. Each is a function of its config."""
