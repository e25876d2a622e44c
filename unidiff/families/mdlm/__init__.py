"""The MDLM family."""
