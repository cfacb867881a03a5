/* Preloaded into the fork server: counts the system calls that touch files below one folder, and
 * makes the chosen one fail, kill or interrupt the process, or find its file cut short.
 *
 * Every call is a numbered point with a name. Descriptors are followed from open to close, so
 * that calls on standard streams and on the program's own files are not points.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { ERROR = 1, SIGNAL = 2, TRUNCATE = 3 };
enum { UNWATCHED = 0, WRITTEN = 1, READ = 2, FOLDER = 3 };

#define POINTS 4096
#define NAME 24
#define DESCRIPTORS 65536

static char root[4096];
static size_t root_length;
static int armed, action, value, maps = 1;
static long target, seen;
static char names[POINTS][NAME];
static unsigned char kinds[DESCRIPTORS];

/* Begin to count the calls on files below `folder`; the `nth` is struck. */
void faults_arm(const char *folder, long nth, int what, int number) {
    strncpy(root, folder, sizeof root - 1);
    root_length = strlen(root);
    target = nth;
    action = what;
    value = number;
    seen = 0;
    armed = 1;
}

/* Whether files below the folder can be mapped into memory, as they cannot on some mounts. */
void faults_maps(int allowed) { maps = allowed; }

long faults_count(void) { return seen; }

const char *faults_name(long index) { return index < POINTS ? names[index] : "beyond the log"; }

static int below(int folder, const char *path) {
    if (!armed || path == NULL) return 0;
    if (path[0] != '/') return folder == AT_FDCWD || (folder >= 0 && folder < DESCRIPTORS && kinds[folder]);
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}

static int kind(int descriptor) {
    return armed && descriptor >= 0 && descriptor < DESCRIPTORS ? kinds[descriptor] : UNWATCHED;
}

/* Whether the call is to fail, with errno set. */
static int struck(const char *name, int descriptor) {
    long place = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (place <= POINTS) strncpy(names[place - 1], name, NAME - 1);
    if (place != target) return 0;
    if (action == SIGNAL) {
        kill(getpid(), value);
        return 0;
    }
    if (action == TRUNCATE) {
        char link[64], path[4096];
        struct stat found;
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        ssize_t length = readlink(link, path, sizeof path - 1);
        if (length > 0 && fstat(descriptor, &found) == 0) {
            path[length] = 0;
            if (truncate(path, found.st_size / 2) != 0) return 0;
        }
        return 0;
    }
    errno = value;
    return 1;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int opened(int folder, const char *path, int flags, mode_t mode, int (*real)(int, const char *, int, ...)) {
    struct stat found;
    int is_watched = below(folder, path), what = WRITTEN;
    if (is_watched) {
        if ((flags & O_ACCMODE) == O_RDONLY && !(flags & O_CREAT))
            what = fstatat(folder, path, &found, 0) == 0 && S_ISDIR(found.st_mode) ? FOLDER : READ;
        if (struck(what == WRITTEN ? "open" : what == READ ? "open to read" : "open a folder", -1)) return -1;
    }
    int descriptor = real(folder, path, flags, mode);
    if (descriptor >= 0 && descriptor < DESCRIPTORS) kinds[descriptor] = is_watched ? what : UNWATCHED;
    return descriptor;
}

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = va_arg(more, mode_t); \
        va_end(more); \
        static int (*real)(int, const char *, int, ...); \
        if (!real) real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, "openat64"); \
        return opened(folder, path, flags, mode, real); \
    }
OPENAT(openat)
OPENAT(openat64)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = va_arg(more, mode_t); \
        va_end(more); \
        static int (*real)(int, const char *, int, ...); \
        if (!real) real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, "openat64"); \
        return opened(AT_FDCWD, path, flags, mode, real); \
    }
OPEN(open)
OPEN(open64)

/* The kernel closes the descriptor even when close fails. */
int close(int descriptor) {
    REAL(int, "close", int);
    int what = kind(descriptor);
    int fails = what && struck(what == WRITTEN ? "close" : what == READ ? "close what was read" : "close a folder", descriptor);
    int number = errno;
    if (descriptor >= 0 && descriptor < DESCRIPTORS) kinds[descriptor] = UNWATCHED;
    int result = real(descriptor);
    if (fails) errno = number;
    return fails ? -1 : result;
}

/* A copy of a descriptor is watched as the first is. */
#define DUP_RESULT(call) \
    int copy = call; \
    if (copy >= 0 && copy < DESCRIPTORS && descriptor >= 0 && descriptor < DESCRIPTORS) kinds[copy] = kinds[descriptor]; \
    return copy

int dup(int descriptor) {
    REAL(int, "dup", int);
    DUP_RESULT(real(descriptor));
}

ssize_t write(int descriptor, const void *data, size_t length) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (kind(descriptor) && struck("write", descriptor)) return -1;
    return real(descriptor, data, length);
}

ssize_t pwrite64(int descriptor, const void *data, size_t length, off_t place) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off_t);
    if (kind(descriptor) && struck("write", descriptor)) return -1;
    return real(descriptor, data, length, place);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    if (kind(descriptor) && struck("write", descriptor)) return -1;
    return real(descriptor, parts, count);
}

ssize_t read(int descriptor, void *data, size_t length) {
    REAL(ssize_t, "read", int, void *, size_t);
    if (kind(descriptor) && struck("read", descriptor)) return -1;
    return real(descriptor, data, length);
}

ssize_t pread64(int descriptor, void *data, size_t length, off_t place) {
    REAL(ssize_t, "pread64", int, void *, size_t, off_t);
    if (kind(descriptor) && struck("read", descriptor)) return -1;
    return real(descriptor, data, length, place);
}

ssize_t preadv64v2(int descriptor, const struct iovec *parts, int count, off_t place, int flags) {
    REAL(ssize_t, "preadv64v2", int, const struct iovec *, int, off_t, int);
    if (kind(descriptor) && struck("read", descriptor)) return -1;
    return real(descriptor, parts, count, place, flags);
}

ssize_t preadv64(int descriptor, const struct iovec *parts, int count, off_t place) {
    REAL(ssize_t, "preadv64", int, const struct iovec *, int, off_t);
    if (kind(descriptor) && struck("read", descriptor)) return -1;
    return real(descriptor, parts, count, place);
}

ssize_t sendfile64(int out, int in, off_t *place, size_t count) {
    REAL(ssize_t, "sendfile64", int, int, off_t *, size_t);
    if (kind(out) && struck("sendfile", action == TRUNCATE ? in : out)) return -1;
    return real(out, in, place, count);
}

ssize_t copy_file_range(int in, off_t *from, int out, off_t *to, size_t count, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off_t *, int, off_t *, size_t, unsigned);
    if (kind(out) && struck("copy", action == TRUNCATE ? in : out)) return -1;
    return real(in, from, out, to, count, flags);
}

int fsync(int descriptor) {
    REAL(int, "fsync", int);
    int what = kind(descriptor);
    if (what && struck(what == FOLDER ? "fsync a folder" : "fsync", descriptor)) return -1;
    return real(descriptor);
}

/* Returns the error instead of setting errno. */
int posix_fallocate64(int descriptor, off_t place, off_t length) {
    REAL(int, "posix_fallocate64", int, off_t, off_t);
    if (kind(descriptor) && struck("fallocate", descriptor)) return errno;
    return real(descriptor, place, length);
}

int ftruncate64(int descriptor, off_t length) {
    REAL(int, "ftruncate64", int, off_t);
    if (kind(descriptor) && struck("truncate", descriptor)) return -1;
    return real(descriptor, length);
}

int fchmod(int descriptor, mode_t mode) {
    REAL(int, "fchmod", int, mode_t);
    if (kind(descriptor) && struck("chmod", descriptor)) return -1;
    return real(descriptor, mode);
}

int chmod(const char *path, mode_t mode) {
    REAL(int, "chmod", const char *, mode_t);
    if (below(AT_FDCWD, path) && struck("chmod", -1)) return -1;
    return real(path, mode);
}

int fchmodat(int folder, const char *path, mode_t mode, int flags) {
    REAL(int, "fchmodat", int, const char *, mode_t, int);
    if (below(folder, path) && struck("chmod", -1)) return -1;
    return real(folder, path, mode, flags);
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    if (below(AT_FDCWD, to) && struck("rename", -1)) return -1;
    return real(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    if (below(to_folder, to) && struck("rename", -1)) return -1;
    return real(from_folder, from, to_folder, to);
}

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    REAL(int, "linkat", int, const char *, int, const char *, int);
    if (below(to_folder, to) && struck("link", -1)) return -1;
    return real(from_folder, from, to_folder, to, flags);
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    if (below(AT_FDCWD, path) && struck("unlink", -1)) return -1;
    return real(path);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    if (below(folder, path) && struck(flags & AT_REMOVEDIR ? "rmdir" : "unlink", -1)) return -1;
    return real(folder, path, flags);
}

int rmdir(const char *path) {
    REAL(int, "rmdir", const char *);
    if (below(AT_FDCWD, path) && struck("rmdir", -1)) return -1;
    return real(path);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    if (below(AT_FDCWD, path) && struck("mkdir", -1)) return -1;
    return real(path, mode);
}

#define MMAP(name) \
    void *name(void *place, size_t length, int protection, int flags, int descriptor, off_t offset) { \
        REAL(void *, "mmap64", void *, size_t, int, int, int, off_t); \
        if (!maps && kind(descriptor)) { \
            errno = ENODEV; \
            return MAP_FAILED; \
        } \
        return real(place, length, protection, flags, descriptor, offset); \
    }
MMAP(mmap)
MMAP(mmap64)
