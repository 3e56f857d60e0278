/* A TCP proxy on loopback that delays every byte: delay PORT TARGET ONE_WAY_MS CUT_BYTES SEED.
   Half the round trip each way, no limit of rate, no loss. CUT_BYTES > 0: each connection is reset after
   a random number of bytes up to twice that many came down. One process a connection. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 64 * 1024, PIECES = 2048 }; /* 128 MB: more than 30 ms at 4 GB/s */
struct piece { double due; int length, sent; char *bytes; };
struct way { int from, to, open; long carried; unsigned head, tail; struct piece ring[PIECES]; };
static struct way ways[2];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static int take(struct way *way, double delay) { /* 0: the sender has ended */
    struct piece *piece = &way->ring[way->head % PIECES];
    if (!piece->bytes) piece->bytes = malloc(PIECE);
    ssize_t got = recv(way->from, piece->bytes, PIECE, MSG_DONTWAIT);
    if (got < 0) return errno == EAGAIN || errno == EINTR;
    if (got == 0) return 0;
    piece->due = now() + delay, piece->length = got, piece->sent = 0;
    way->head++, way->carried += got;
    return 1;
}

static int pass(struct way *way) { /* 0: the receiver has gone */
    struct piece *piece = &way->ring[way->tail % PIECES];
    ssize_t sent = send(way->to, piece->bytes + piece->sent, piece->length - piece->sent, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) return errno == EAGAIN || errno == EINTR;
    if ((piece->sent += sent) == piece->length) way->tail++;
    return 1;
}

static void carry(int near, int far, double delay, long cut) {
    ways[0].from = ways[1].to = far, ways[0].to = ways[1].from = near, ways[0].open = ways[1].open = 1;
    while (ways[0].open || ways[1].open || ways[0].head != ways[0].tail || ways[1].head != ways[1].tail) {
        struct pollfd polled[4];
        double soonest = now() + 60;
        for (int i = 0; i < 2; i++) {
            struct way *way = &ways[i];
            int waits = way->head != way->tail, room = way->head - way->tail < PIECES;
            double due = way->ring[way->tail % PIECES].due;
            polled[2 * i] = (struct pollfd){way->open && room ? way->from : -1, POLLIN, 0};
            polled[2 * i + 1] = (struct pollfd){waits && due <= now() ? way->to : -1, POLLOUT, 0};
            if (waits && due > now() && due < soonest) soonest = due;
        }
        struct timespec left = {0, 0};
        double wait = soonest - now();
        if (wait > 0) left.tv_sec = (long)wait, left.tv_nsec = (long)((wait - (long)wait) * 1e9);
        if (ppoll(polled, 4, &left, NULL) < 0 && errno != EINTR) exit(1);
        for (int i = 0; i < 2; i++) {
            struct way *way = &ways[i];
            if (polled[2 * i].revents && !take(way, delay)) way->open = 0;
            if (polled[2 * i + 1].revents && !pass(way)) exit(0);
            if (!way->open && way->head == way->tail) shutdown(way->to, SHUT_WR);
        }
        if (cut && ways[0].carried > cut) {
            struct linger reset = {1, 0};
            setsockopt(near, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
            exit(0);
        }
    }
    exit(0);
}

int main(int count, char **words) {
    if (count != 6) return 2;
    struct sockaddr_in here = {AF_INET, htons(atoi(words[1])), {htonl(INADDR_LOOPBACK)}, {0}}, there = here;
    there.sin_port = htons(atoi(words[2]));
    double delay = atof(words[3]) / 1000;
    long cut = atol(words[4]);
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    srandom(atoi(words[5]));
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    signal(SIGCHLD, SIG_IGN);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 64)) return 1;
    socklen_t size = sizeof here;
    getsockname(listener, (struct sockaddr *)&here, &size);
    printf("%d\n", ntohs(here.sin_port));
    fflush(stdout);
    for (;;) {
        int near = accept(listener, NULL, NULL);
        long after = cut ? 1 + random() % (2 * cut) : 0;
        if (near < 0 || fork()) {
            close(near);
            continue;
        }
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        int far = socket(AF_INET, SOCK_STREAM, 0);
        setsockopt(near, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        setsockopt(far, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        if (connect(far, (struct sockaddr *)&there, sizeof there)) return 1;
        carry(near, far, delay, after);
    }
}
