// Loaded by LD_PRELOAD: counts the calls of the file system that touch a folder, and lets one of them go wrong.
//
// arm(folder, at, how, log): call number `at` (from 0; -1: none) fails. how > 0: with this errno; -1: a write stops
// halfway, then EIO; -2: the process ends there. Each call is noted in the file `log`, one line each:
// name TAB path TAB path of a rename TAB inode TAB size afterwards. What a rename replaces is linked beside the log.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define KILLED 77
static char folder[PATH_MAX], shadow[PATH_MAX];
static long at = -1, how, count;
static int notes = -1;

void arm(const char *f, long number, long kind, const char *log) {
  notes = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0600);
  snprintf(shadow, sizeof shadow, "%s", log);
  at = number, how = kind, count = 0;
  snprintf(folder, sizeof folder, "%s", f);
}

__attribute__((constructor)) static void from_environment(void) {
  const char *f = getenv("FAULTS_FOLDER");
  if (f) arm(f, atol(getenv("FAULTS_AT")), atol(getenv("FAULTS_HOW")), getenv("FAULTS_LOG"));
}

static int path_of(int directory, const char *path, char *out) {
  out[0] = 0;
  if (!folder[0]) return 0;
  if (path && path[0] == '/') snprintf(out, PATH_MAX, "%s", path);
  else {
    char link[64], base[PATH_MAX];
    snprintf(link, sizeof link, directory == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", directory);
    long n = syscall(SYS_readlink, link, base, sizeof base - 1);
    if (n < 0) return 0;
    base[n] = 0;
    if (path) snprintf(out, PATH_MAX, "%.2000s/%.2000s", base, path);
    else snprintf(out, PATH_MAX, "%s", base);
  }
  size_t n = strlen(folder);
  return !strncmp(out, folder, n) && (out[n] == '/' || !out[n]);
}

static void note(const char *name, const char *path, const char *other, int fd) {
  char line[3 * PATH_MAX];
  struct stat s = {0};
  if (fd >= 0) fstat(fd, &s);
  int n = snprintf(line, sizeof line, "%s\t%s\t%s\t%lu\t%ld\n", name, path, other ? other : "",
                   (unsigned long)s.st_ino, (long)s.st_size);
  syscall(SYS_write, notes, line, n);
}

// 1 where this call has to fail; errno is set. Ends the process where that is asked for.
static int fails(void) {
  if (__atomic_fetch_add(&count, 1, __ATOMIC_SEQ_CST) != at) return 0;
  if (how == -2) {
    syscall(SYS_write, notes, "end\t\t\t0\t0\n", 10);
    syscall(SYS_exit_group, KILLED);
  }
  errno = how > 0 ? (int)how : EIO;
  return 1;
}

#define NEXT(name) __typeof__(name) *next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static int writes_of(const char *mode) { return !!strpbrk(mode, "wa+"); }

#define OPEN(name)                                                                  \
  int name(const char *path, int flags, ...) {                                      \
    NEXT(name);                                                                     \
    va_list l; va_start(l, flags); int mode = va_arg(l, int); va_end(l);            \
    char full[PATH_MAX];                                                            \
    if (!path_of(AT_FDCWD, path, full)) return next(path, flags, mode);             \
    if (fails()) return -1;                                                         \
    int fd = next(path, flags, mode);                                               \
    note(flags & (O_WRONLY | O_RDWR | O_CREAT) ? "create" : "open", full, 0, fd);   \
    return fd;                                                                      \
  }
OPEN(open) OPEN(open64)

#define OPENAT(name)                                                                \
  int name(int d, const char *path, int flags, ...) {                               \
    NEXT(name);                                                                     \
    va_list l; va_start(l, flags); int mode = va_arg(l, int); va_end(l);            \
    char full[PATH_MAX];                                                            \
    if (!path_of(d, path, full)) return next(d, path, flags, mode);                 \
    if (fails()) return -1;                                                         \
    int fd = next(d, path, flags, mode);                                            \
    note(flags & (O_WRONLY | O_RDWR | O_CREAT) ? "create" : "open", full, 0, fd);   \
    return fd;                                                                      \
  }
OPENAT(openat) OPENAT(openat64)

#define FOPEN(name)                                                                 \
  FILE *name(const char *path, const char *mode) {                                  \
    NEXT(name);                                                                     \
    char full[PATH_MAX];                                                            \
    if (!path_of(AT_FDCWD, path, full)) return next(path, mode);                    \
    if (fails()) return 0;                                                          \
    FILE *f = next(path, mode);                                                     \
    note(writes_of(mode) ? "create" : "open", full, 0, f ? fileno(f) : -1);         \
    return f;                                                                       \
  }
FOPEN(fopen) FOPEN(fopen64)

#define WRITE(name, torn, signature, ...)                                           \
  ssize_t name signature {                                                          \
    NEXT(name);                                                                     \
    char full[PATH_MAX];                                                            \
    if (!path_of(fd, 0, full)) return next(__VA_ARGS__);                            \
    if (fails()) { if (how == -1) torn; errno = how > 0 ? (int)how : EIO; return -1; } \
    ssize_t done = next(__VA_ARGS__);                                                 \
    note("write", full, 0, fd);                                                     \
    return done;                                                                    \
  }
WRITE(write, (void)!next(fd, b, n / 2), (int fd, const void *b, size_t n), fd, b, n)
WRITE(pwrite, (void)!next(fd, b, n / 2, o), (int fd, const void *b, size_t n, off_t o), fd, b, n, o)
WRITE(pwrite64, (void)!next(fd, b, n / 2, o), (int fd, const void *b, size_t n, off64_t o), fd, b, n, o)
WRITE(writev, (void)!next(fd, v, n / 2), (int fd, const struct iovec *v, int n), fd, v, n)

#define ON_FD(name, signature, ...)                                                 \
  int name signature {                                                              \
    NEXT(name);                                                                     \
    char full[PATH_MAX];                                                            \
    if (!path_of(fd, 0, full)) return next(__VA_ARGS__);                            \
    if (fails()) return -1;                                                         \
    int r = next(__VA_ARGS__);                                                      \
    note(#name, full, 0, fd);                                                       \
    return r;                                                                       \
  }
ON_FD(fsync, (int fd), fd) ON_FD(fdatasync, (int fd), fd)
ON_FD(ftruncate, (int fd, off_t n), fd, n) ON_FD(ftruncate64, (int fd, off64_t n), fd, n)

#define ON_PATH(name, directory, signature, ...)                                    \
  int name signature {                                                              \
    NEXT(name);                                                                     \
    char full[PATH_MAX];                                                            \
    if (!path_of(directory, path, full)) return next(__VA_ARGS__);                  \
    if (fails()) return -1;                                                         \
    int r = next(__VA_ARGS__);                                                      \
    note(#name, full, 0, -1);                                                       \
    return r;                                                                       \
  }
ON_PATH(unlink, AT_FDCWD, (const char *path), path) ON_PATH(rmdir, AT_FDCWD, (const char *path), path)
ON_PATH(unlinkat, d, (int d, const char *path, int flags), d, path, flags)
ON_PATH(mkdir, AT_FDCWD, (const char *path, mode_t mode), path, mode)
ON_PATH(mkdirat, d, (int d, const char *path, mode_t mode), d, path, mode)
ON_PATH(truncate, AT_FDCWD, (const char *path, off_t n), path, n)

static void keep(const char *replaced) {
  struct stat s;
  char copy[PATH_MAX + 32];
  if (stat(replaced, &s) || !S_ISREG(s.st_mode)) return;
  snprintf(copy, sizeof copy, "%s.%ld", shadow, count - 1);
  syscall(SYS_linkat, AT_FDCWD, replaced, AT_FDCWD, copy, 0);
}

#define RENAME(name, d1, d2, signature, ...)                                        \
  int name signature {                                                              \
    NEXT(name);                                                                     \
    char a[PATH_MAX], b[PATH_MAX];                                                  \
    int ours = path_of(d1, from, a);                                                \
    ours |= path_of(d2, to, b);                                                     \
    if (!ours) return next(__VA_ARGS__);                                            \
    if (fails()) return -1;                                                         \
    keep(b);                                                                        \
    int r = next(__VA_ARGS__);                                                      \
    if (!r) note("rename", a, b, -1); else note("stat", a, b, -1);                  \
    return r;                                                                       \
  }
RENAME(rename, AT_FDCWD, AT_FDCWD, (const char *from, const char *to), from, to)
RENAME(renameat, x, y, (int x, const char *from, int y, const char *to), x, from, y, to)
