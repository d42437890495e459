"""OAMIP: neuron importance by mixed-integer programming (ElAraby, Wolf, Carvalho, CPAIOR 2023)."""
