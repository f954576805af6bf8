"""Black-box offline mode: any program, run many times a task through the gateway, grouped, scored and completed."""
