"""Recovery: label-free distillation of a pruned model with the original as its teacher. Needs the extra ``recover``."""
