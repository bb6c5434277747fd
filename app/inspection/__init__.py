"""Looking into uploaded files. All parsing of hostile input happens in child processes with limits (`pool`)."""
