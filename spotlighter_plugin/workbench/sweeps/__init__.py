"""Many runs: what is planned, who runs them, and the paper's ablations."""
