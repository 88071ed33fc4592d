/* Makes calls of the C library fail, or kills the process before one of them: a disk that lacks something, a power cut. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

/* SHIM_KILL=n: the process dies before its n-th call that changes the disk. SHIM_FAIL=call:errno[:n]: a call fails, from the n-th on. */
static int count;
static void step(void) {
  const char *at = getenv("SHIM_KILL");
  if (at && __sync_add_and_fetch(&count, 1) == atoi(at)) kill(getpid(), SIGKILL);
}
static int fails(const char *call) {
  const char *spec = getenv("SHIM_FAIL");
  size_t n = strlen(call);
  if (!spec || strncmp(spec, call, n) || spec[n] != ':') return 0;
  char *rest;
  int code = (int)strtol(spec + n + 1, &rest, 10);
  if (*rest == ':' && __sync_add_and_fetch(&count, 1) < atoi(rest + 1)) return 0;
  errno = code;
  return 1;
}
#define NEXT(name) __typeof__(&name) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
int flock(int fd, int op) { NEXT(flock); return fails("flock") ? -1 : next(fd, op); }
int symlink(const char *a, const char *b) { NEXT(symlink); step(); return fails("symlink") ? -1 : next(a, b); }
int fsync(int fd) { NEXT(fsync); step(); return fails("fsync") ? -1 : next(fd); }
int rename(const char *a, const char *b) { NEXT(rename); step(); return fails("rename") ? -1 : next(a, b); }
int mkdir(const char *p, mode_t m) { NEXT(mkdir); step(); return fails("mkdir") ? -1 : next(p, m); }
int unlink(const char *p) { NEXT(unlink); step(); return fails("unlink") ? -1 : next(p); }
int unlinkat(int d, const char *p, int f) { NEXT(unlinkat); step(); return fails("unlinkat") ? -1 : next(d, p, f); }
ssize_t write(int fd, const void *b, size_t n) {
  NEXT(write);
  if (fd > 2) { step(); if (fails("write")) return -1; }
  return next(fd, b, n);
}
ssize_t read(int fd, void *b, size_t n) { NEXT(read); return fd > 2 && fails("read") ? -1 : next(fd, b, n); }
