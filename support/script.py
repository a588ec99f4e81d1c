"""How a script begins and ends. Every script imports this first, and it imports little itself, so that Ctrl-C
is answered while torch is still being imported."""
import ctypes
import os
import sys

# A waiting OpenMP thread spins 300,000 times before it sleeps. Where other processes run, it keeps a core
# that they need: a tuning step took nine times as long. Scripts that mostly decode keep this default, since
# each token has many short waits, and waking up took 3 % of a routed token's time.
decodes = any(os.path.basename(word) in ("bench", "bench.py", "sample", "sample.py") for word in sys.argv[:2])
if not decodes and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")        # about 30 us; read when torch is imported


def end_quietly(kind, error, trace):
    """For sys.excepthook: no traceback after Ctrl-C."""
    if issubclass(kind, KeyboardInterrupt):
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = end_quietly


def keep_freed_memory():
    """Have glibc keep what is freed for what is allocated next. By default every layer's large tensors go
    back to the system and return as pages to be zeroed: a sixth of a prefill's time on a CPU, a tenth of
    tuning's."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**30)                                               # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)                                           # M_TRIM_THRESHOLD


def prepare_streams():
    """Let what the terminal's encoding lacks be printed as ?, print nowhere where a stream is closed, and
    write whole lines, as `python -u` does not, to the stderr that several processes share."""
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            in_lines = {"line_buffering": True, "write_through": False} if name == "stderr" else {}
            stream.reconfigure(errors="replace", **in_lines)


def drop_unwritable_streams():
    """Send nowhere what Python would flush at exit to a closed pipe or a full disk."""
    for stream in sys.stdout, sys.stderr:
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def lack_of_memory(error):
    """The message for an error that means "out of memory", on any device; None for other errors."""
    from torch import OutOfMemoryError

    from support.files import NO_MEMORY
    if isinstance(error, OutOfMemoryError):                              # CUDA's, which tells how much
        why = str(error).split(". ")[0]
    elif isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        why = "out of memory"
    else:
        return None
    return f"{why}; lower --tokens, --batch or --context, route fewer --layers, or take a smaller model"


def run_script(name, main):
    """main(), with bad input told in one sentence and exit status 1, and Ctrl-C without a traceback. A reader
    that goes away, as `head` does, ends the script. Of several processes the first that ends speaks."""
    from support.files import InputError
    from support.parallel import leave, peer_failure, say_once
    keep_freed_memory()
    prepare_streams()
    try:
        main()
        sys.stdout.flush()
    except InputError as e:
        sys.exit(say_once(f"{name}: {e}") or 1)
    except (RuntimeError, MemoryError) as e:
        why = lack_of_memory(e) or peer_failure(e)
        if not why:
            raise
        sys.exit(say_once(f"{name}: {why}") or 1)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        if e.filename is not None:       # a file, not a stream
            raise
        drop_unwritable_streams()
        if not isinstance(e, BrokenPipeError):
            sys.exit(f"{name}: the system refused to print or go on ({e.strerror}); what it saved is whole")
    finally:
        leave()
