"""GPU kernels in Triton, each beside its reference formula. Import the file of a kernel; nothing is loaded here."""
