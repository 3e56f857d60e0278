/* Counts the calls that make something durable, and at a chosen one lets the process die, or the call fail; or stops the
 * process at each of them, while somebody looks at what a crash there would leave.
 *
 *     gcc -shared -fPIC -O2 -o libfault.so fault.c -ldl; LD_PRELOAD=./libfault.so python3 ...
 *
 * Counted are opening for writing, and writing, syncing, renaming, linking, unlinking, making folders, sizes and modes,
 * of regular files and folders only: pipes, sockets and terminals are left alone. For programs with one thread.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN = 'o', WRITE = 'w', SYNC = 's', RENAME = 'r', LINK = 'l', UNLINK = 'u', FOLDER = 'f', SIZE = 't', MODE = 'm' };
enum verdict { PASS, TEAR, FAIL, DIE };
enum { HALFWAY = 'h', TORN = 't' }; /* what a watcher is told inside a torn write, and how it asks for one */
enum { KILLED = 86, KINDS = 1 << 16, DESCRIPTORS = 4096 };

static long calls, die_at, fail_from, fail_to, failed, resynced;
static int armed, torn, code;
static int watcher = -1; /* a socket; its other end answers every byte with one */
static char kinds[KINDS];
static char unsynced[DESCRIPTORS]; /* open files whose last sync failed: syncing them again proves nothing */

/* From now on: die at the call `die` (0: never), `tear`: after half of it if it is a write; the calls `from` to `to`
 * fail with `number`. Counts start anew. */
void fault_arm(long die, int tear, long from, long to, int number)
{
    calls = failed = resynced = 0;
    die_at = die, torn = tear, fail_from = from, fail_to = to, code = number, armed = 1, watcher = -1;
    memset(unsynced, 0, sizeof unsynced);
}

/* From now on: before every call tell its kind on the socket, and wait for an answer; to TORN a write is done by halves,
 * with HALFWAY told, and an answer awaited, in between. Counts start anew. */
void fault_watch(int socket)
{
    fault_arm(0, 0, 0, 0, 0);
    watcher = socket;
}

void fault_disarm(void) { armed = 0; }
long fault_calls(void) { return calls; }
long fault_failed(void) { return failed; }
long fault_resynced(void) { return resynced; }
const char *fault_kinds(void) { return kinds; }

static int durable(int fd)
{
    struct stat seen;
    return armed && fstat(fd, &seen) == 0 && (S_ISREG(seen.st_mode) || S_ISDIR(seen.st_mode));
}

/* What the watcher answers; without it there is nothing left to do. */
static char ask(char what)
{
    int kept = errno;
    if (send(watcher, &what, 1, MSG_NOSIGNAL) != 1 || recv(watcher, &what, 1, 0) != 1) _exit(KILLED);
    errno = kept;
    return what;
}

static enum verdict strike(enum kind kind)
{
    if (!armed) return PASS;
    if (calls < KINDS) kinds[calls] = (char)kind;
    calls++;
    if (watcher >= 0) return ask((char)kind) == TORN && kind == WRITE ? TEAR : PASS;
    if (calls == die_at) return DIE;
    if (calls < fail_from || calls > fail_to) return PASS;
    failed++;
    errno = code;
    return FAIL;
}

#define NEXT(name) static __typeof__(&name) next; if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define STRIKE(kind) \
    switch (strike(kind)) { \
    case DIE: _exit(KILLED); \
    case FAIL: return -1; \
    default: break; \
    }
/* `rest`: what is left of the call once `half` of it has written `done` bytes. */
#define STRIKE_WRITE(half, rest) { \
    ssize_t done, more; \
    switch (strike(WRITE)) { \
    case DIE: if (torn) { half; } _exit(KILLED); \
    case FAIL: return -1; \
    case TEAR: done = half; if (done < 0) return done; ask(HALFWAY); more = rest; return more < 0 ? done : done + more; \
    case PASS: break; \
    } \
    }
#define MODE_OF(flags, mode) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

int open(const char *path, int flags, ...) { NEXT(open); MODE_OF(flags, mode); if (WRITES(flags)) STRIKE(OPEN) return next(path, flags, mode); }
int open64(const char *path, int flags, ...) { NEXT(open64); MODE_OF(flags, mode); if (WRITES(flags)) STRIKE(OPEN) return next(path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { NEXT(openat); MODE_OF(flags, mode); if (WRITES(flags)) STRIKE(OPEN) return next(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { NEXT(openat64); MODE_OF(flags, mode); if (WRITES(flags)) STRIKE(OPEN) return next(at, path, flags, mode); }
int creat(const char *path, mode_t mode) { NEXT(creat); STRIKE(OPEN) return next(path, mode); }

ssize_t write(int fd, const void *bytes, size_t size)
{
    NEXT(write);
    if (durable(fd)) STRIKE_WRITE(next(fd, bytes, size / 2), next(fd, (const char *)bytes + done, size - done))
    return next(fd, bytes, size);
}

ssize_t pwrite(int fd, const void *bytes, size_t size, off_t at)
{
    NEXT(pwrite);
    if (durable(fd)) STRIKE_WRITE(next(fd, bytes, size / 2, at),
                                  next(fd, (const char *)bytes + done, size - done, at + done))
    return next(fd, bytes, size, at);
}

ssize_t pwrite64(int fd, const void *bytes, size_t size, off64_t at)
{
    NEXT(pwrite64);
    if (durable(fd)) STRIKE_WRITE(next(fd, bytes, size / 2, at),
                                  next(fd, (const char *)bytes + done, size - done, at + done))
    return next(fd, bytes, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    NEXT(writev);
    if (durable(fd)) STRIKE_WRITE(next(fd, parts, count / 2), next(fd, parts + count / 2, count - count / 2))
    return next(fd, parts, count);
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at)
{
    NEXT(pwritev);
    if (durable(fd)) STRIKE_WRITE(next(fd, parts, count / 2, at),
                                  next(fd, parts + count / 2, count - count / 2, at + done))
    return next(fd, parts, count, at);
}

ssize_t copy_file_range(int from, off64_t *from_at, int to, off64_t *to_at, size_t size, unsigned flags)
{
    NEXT(copy_file_range);
    if (durable(to)) STRIKE_WRITE(next(from, from_at, to, to_at, size / 2, flags),
                                  next(from, from_at, to, to_at, size - done, flags))
    return next(from, from_at, to, to_at, size, flags);
}

int posix_fallocate(int fd, off_t at, off_t size) { NEXT(posix_fallocate); if (durable(fd)) { switch (strike(SIZE)) { case DIE: _exit(KILLED); case FAIL: return code; default: break; } } return next(fd, at, size); }

/* SQLite writes what a failed sync lost once more before it syncs again (its log's frames, a checkpoint's pages). */
static int is_index(int fd)
{
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    path[size < 0 ? 0 : size] = 0;
    return strstr(path, "/index.db") != NULL;
}

static enum verdict sync_strike(int fd)
{
    int known = fd >= 0 && fd < DESCRIPTORS;
    if (armed && known && unsynced[fd] && !is_index(fd)) resynced++;
    enum verdict verdict = strike(SYNC);
    if (verdict == FAIL && known) unsynced[fd] = 1;
    return verdict;
}

int fsync(int fd) { NEXT(fsync); switch (sync_strike(fd)) { case DIE: _exit(KILLED); case FAIL: return -1; default: break; } return next(fd); }
int fdatasync(int fd) { NEXT(fdatasync); switch (sync_strike(fd)) { case DIE: _exit(KILLED); case FAIL: return -1; default: break; } return next(fd); }
int close(int fd) { NEXT(close); if (fd >= 0 && fd < DESCRIPTORS) unsynced[fd] = 0; return next(fd); }

int rename(const char *from, const char *to) { NEXT(rename); STRIKE(RENAME) return next(from, to); }
int renameat(int from_at, const char *from, int to_at, const char *to) { NEXT(renameat); STRIKE(RENAME) return next(from_at, from, to_at, to); }
int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags) { NEXT(renameat2); STRIKE(RENAME) return next(from_at, from, to_at, to, flags); }
int link(const char *from, const char *to) { NEXT(link); STRIKE(LINK) return next(from, to); }
int linkat(int from_at, const char *from, int to_at, const char *to, int flags) { NEXT(linkat); STRIKE(LINK) return next(from_at, from, to_at, to, flags); }
int symlink(const char *to, const char *path) { NEXT(symlink); STRIKE(LINK) return next(to, path); }
int symlinkat(const char *to, int at, const char *path) { NEXT(symlinkat); STRIKE(LINK) return next(to, at, path); }
int unlink(const char *path) { NEXT(unlink); STRIKE(UNLINK) return next(path); }
int unlinkat(int at, const char *path, int flags) { NEXT(unlinkat); STRIKE(UNLINK) return next(at, path, flags); }
int rmdir(const char *path) { NEXT(rmdir); STRIKE(UNLINK) return next(path); }
int mkdir(const char *path, mode_t mode) { NEXT(mkdir); STRIKE(FOLDER) return next(path, mode); }
int mkdirat(int at, const char *path, mode_t mode) { NEXT(mkdirat); STRIKE(FOLDER) return next(at, path, mode); }
int truncate(const char *path, off_t size) { NEXT(truncate); STRIKE(SIZE) return next(path, size); }
int truncate64(const char *path, off64_t size) { NEXT(truncate64); STRIKE(SIZE) return next(path, size); }
int ftruncate(int fd, off_t size) { NEXT(ftruncate); if (durable(fd)) STRIKE(SIZE) return next(fd, size); }
int ftruncate64(int fd, off64_t size) { NEXT(ftruncate64); if (durable(fd)) STRIKE(SIZE) return next(fd, size); }
int chmod(const char *path, mode_t mode) { NEXT(chmod); STRIKE(MODE) return next(path, mode); }
int fchmod(int fd, mode_t mode) { NEXT(fchmod); if (durable(fd)) STRIKE(MODE) return next(fd, mode); }
int fchmodat(int at, const char *path, mode_t mode, int flags) { NEXT(fchmodat); STRIKE(MODE) return next(at, path, mode, flags); }
int fchown(int fd, uid_t user, gid_t group) { NEXT(fchown); if (durable(fd)) STRIKE(MODE) return next(fd, user, group); }
