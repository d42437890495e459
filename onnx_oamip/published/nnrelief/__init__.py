"""Neural Network Relief: importance of connections by absolute signal (Dekhovich et al.)."""
