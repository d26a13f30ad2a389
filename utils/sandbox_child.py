"""
What runs between our process and a program in the sandbox (utils/sandbox.py): it reads a job as JSON from standard input,
takes away what the program isn't to have, and becomes the program. Standard library only; started with `python -I -S`.

On Linux: new user, mount, process, network, IPC and host name namespaces; a root directory that holds the system's
programs and Python, read-only, and nothing else of the disk; everything written goes to memory and is gone at the end. Two
processes stay: this one, and process 1 of the namespace, whose end takes every process in it along.
"""

import ctypes
import json
import os
import resource
import signal
import sys

NEW_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000    # user mount pid net ipc uts
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
ATTR_RDONLY, ATTR_NOSUID, AT_RECURSIVE, AT_FDCWD, SYS_MOUNT_SETATTR = 1, 2, 0x8000, -100, 442
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, MNT_DETACH = 1, 4, 38, 2
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
libc = ctypes.CDLL(None, use_errno=True)


def call(name, *args):
    """A function of the C library; raises OSError, with the name, where it fails."""
    wrapped = [a.encode() if isinstance(a, str) else ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    if getattr(libc, name)(*wrapped) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def new_namespaces():
    """Leave the namespaces that we were started in, as user 1000 of the new ones."""
    user, group = os.geteuid(), os.getegid()
    call("unshare", NEW_NAMESPACES)
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def read_only(path, root):
    """The path, with all below it, at its place in the new root; a link as a link."""
    target = root + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        open(target, "w").close()
    call("mount", path, target, None, MS_BIND | MS_REC, None)
    attributes = (ctypes.c_uint64 * 4)(ATTR_RDONLY | ATTR_NOSUID, 0, 0, 0)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, target, AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes))


def new_root(job):
    """Make a file system in memory the root directory."""
    root = job["box"]
    call("mount", "none", "/", None, MS_REC | MS_PRIVATE, None)
    call("mount", "tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={job['disk']},mode=755")
    for path in job["readable"]:
        read_only(path, root)
    for path in DEVICES:
        os.makedirs(root + "/dev", exist_ok=True)
        open(root + path, "w").close()
        call("mount", path, root + path, None, MS_BIND, None)
    for name in ("/box", "/tmp"):
        os.makedirs(root + name, exist_ok=True)
    os.chdir(root)
    call("pivot_root", ".", ".")
    call("umount2", ".", MNT_DETACH)
    os.chdir("/")


def limit(job):
    """Limits of the process and of each that it starts; memory and processes where the kernel keeps them."""
    limits = [(resource.RLIMIT_CPU, job["cpu"]), (resource.RLIMIT_FSIZE, job["disk"]), (resource.RLIMIT_CORE, 0),
              (resource.RLIMIT_NOFILE, 64)]
    if sys.platform == "linux":
        limits.append((resource.RLIMIT_AS, job["memory"]))
    if job["isolation"] == "linux":
        limits.append((resource.RLIMIT_NPROC, job["processes"]))
    for kind, value in limits:
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def become(job, box):
    """Write the program into the box and replace this process by it. Doesn't return."""
    os.chdir(box)
    for name in ("program.py", "stdin"):
        with open(name, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(job[name])
    silent, given = os.open("/dev/null", os.O_WRONLY), os.open("stdin", os.O_RDONLY)
    limit(job)
    if sys.platform == "linux":
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.dup2(given, 0)
    os.dup2(silent, 2)                    # errors of the program are not ours: what we write there says that we failed
    os.closerange(3, 256)
    environment = {"PATH": "/usr/bin:/bin", "HOME": box, "TMPDIR": box, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0",
                   "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    argv = [*job["wrapper"], job["python"], "-s", "-B", "program.py"]
    os.execve(argv[0], argv, environment)


def wait_for(child):
    """Wait until that child ends, whatever else ends before, and return its exit code."""
    while True:
        pid, status = os.wait()
        if pid == child:
            return os.waitstatus_to_exitcode(status) & 0xFF


def main():
    job = json.loads(sys.stdin.read())
    if job["isolation"] != "linux":
        become(job, job["box"])
    new_namespaces()
    first = os.fork()
    if first:
        sys.exit(wait_for(first))
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    new_root(job)
    program = os.fork()
    if program:                           # process 1: when it ends, everything in here ends
        call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
        os._exit(wait_for(program))
    become(job, "/box")


main()
