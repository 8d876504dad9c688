# What a step has used is kept for the next one, on CPUs of Linux; sourced before a command.
#
#   source benchmarks/keep_memory.sh && python -m benchmarks.roofline
#
# XLA asks for the temporaries of a step anew each time, gigabytes of them. glibc would give them back
# at once and the kernel hand them out again, zeroed and in pages of 4 kB, which takes longer than
# many an operation on them. With one arena that is never given back they stay, in large pages where
# the kernel has them. A process then holds the most that it ever needed, and the threads that
# compile wait for each other.
export GLIBC_TUNABLES="glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.hugetlb=1"
