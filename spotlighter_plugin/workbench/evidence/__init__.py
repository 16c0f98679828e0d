"""The table of evidence: hosts, controls and Spotlighter on the same pictures, tuned alike, judged alike."""
