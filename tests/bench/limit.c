/* The limit of this machine: the bare lz4 library on all cores, without anything around it.
 *
 *   limit backup IMAGE          read every data byte of IMAGE, compress every block that is not zero, drop the result
 *   limit restore IMAGE OUT     compress IMAGE into memory (not timed), then decompress and write it to OUT (timed)
 *
 * Invariant: no tool that compresses (or decompresses) each block once with lz4 and reads (or writes) it once
 * can be faster on the same cores. Holes are never read; a zero block is neither compressed nor written.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <lz4.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 65536, RUN = 8 }; /* blocks read at once: what stays in a core's own cache */

typedef struct { off_t offset; uint32_t length; } Piece;             /* at most RUN blocks of the image */
typedef struct { off_t offset; uint32_t raw, stored; char *data; } Block; /* stored == raw: not compressed */

static Piece *pieces;
static size_t piece_count;
static Block *blocks;
static size_t block_count;
static atomic_size_t next_piece, next_block, packed_count;
static atomic_ullong bytes_in, bytes_out;
static int image, out = -1, keep;

static void die(const char *what) { perror(what); exit(1); }

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int all_zero(const char *data, size_t length) {
    return data[0] == 0 && memcmp(data, data + 1, length - 1) == 0;
}

static void list_pieces(off_t size) {
    off_t position = 0, done = 0;
    size_t room = (size_t)(size / (BLOCK * RUN)) * 2 + 65536;
    pieces = malloc(room * sizeof *pieces);
    while (position < size) {
        off_t start = lseek(image, position, SEEK_DATA);
        if (start < 0) {
            if (errno == ENXIO) break;
            die("SEEK_DATA");
        }
        off_t end = lseek(image, start, SEEK_HOLE);
        position = end;
        start -= start % BLOCK; /* whole blocks, each once */
        if (start < done) start = done;
        end = (end + BLOCK - 1) / BLOCK * BLOCK;
        if (end > size) end = size;
        for (; start < end; start += BLOCK * RUN) {
            off_t length = end - start < BLOCK * RUN ? end - start : BLOCK * RUN;
            if (piece_count == room) {
                room *= 2;
                pieces = realloc(pieces, room * sizeof *pieces);
            }
            pieces[piece_count++] = (Piece){start, (uint32_t)length};
        }
        if (end > done) done = end;
    }
}

static void *compress_pieces(void *unused) {
    char *buffer = aligned_alloc(4096, BLOCK * RUN);
    int bound = LZ4_compressBound(BLOCK);
    char *packed = malloc((size_t)bound);
    for (size_t at; (at = atomic_fetch_add(&next_piece, 1)) < piece_count;) {
        Piece piece = pieces[at];
        ssize_t got = pread(image, buffer, piece.length, piece.offset);
        if (got != (ssize_t)piece.length) die("pread");
        unsigned long long result = 0;
        for (uint32_t from = 0; from < piece.length; from += BLOCK) {
            int raw = (int)(piece.length - from < BLOCK ? piece.length - from : BLOCK);
            if (all_zero(buffer + from, (size_t)raw)) continue;
            int stored = LZ4_compress_default(buffer + from, packed, raw, bound);
            if (stored <= 0) die("LZ4_compress_default");
            if (stored > raw) stored = raw;
            result += (unsigned long long)stored;
            if (keep) {
                char *data = malloc((size_t)stored);
                memcpy(data, stored == raw ? buffer + from : packed, (size_t)stored);
                blocks[atomic_fetch_add(&packed_count, 1)] =
                    (Block){piece.offset + from, (uint32_t)raw, (uint32_t)stored, data};
            }
        }
        atomic_fetch_add(&bytes_in, piece.length);
        atomic_fetch_add(&bytes_out, result);
    }
    free(buffer);
    free(packed);
    return unused;
}

static void *restore_blocks(void *unused) {
    char *buffer = aligned_alloc(4096, BLOCK);
    for (size_t at; (at = atomic_fetch_add(&next_block, 16)) < block_count;) {
        for (size_t one = at; one < at + 16 && one < block_count; one++) {
            Block block = blocks[one];
            const char *data = block.data;
            if (block.stored != block.raw) {
                if (LZ4_decompress_safe(block.data, buffer, (int)block.stored, BLOCK) != (int)block.raw)
                    die("LZ4_decompress_safe");
                data = buffer;
            }
            if (pwrite(out, data, block.raw, block.offset) != (ssize_t)block.raw) die("pwrite");
        }
    }
    free(buffer);
    return unused;
}

static void on_all_cores(void *(*work)(void *)) {
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    pthread_t threads[256];
    if (cores > 256) cores = 256;
    for (long core = 0; core < cores; core++)
        if (pthread_create(&threads[core], NULL, work, NULL) != 0) die("pthread_create");
    for (long core = 0; core < cores; core++) pthread_join(threads[core], NULL);
}

static int by_offset(const void *first, const void *second) {
    off_t one = ((const Block *)first)->offset, other = ((const Block *)second)->offset;
    return one < other ? -1 : one > other;
}

int main(int count, char **words) {
    int restore = count == 4 && strcmp(words[1], "restore") == 0;
    if (!restore && !(count == 3 && strcmp(words[1], "backup") == 0)) {
        fprintf(stderr, "usage: limit backup IMAGE | limit restore IMAGE OUT\n");
        return 2;
    }
    struct stat status;
    image = open(words[2], O_RDONLY | O_CLOEXEC);
    if (image < 0 || fstat(image, &status) < 0) die(words[2]);
    keep = restore;
    double began = now();
    list_pieces(status.st_size);
    if (keep) blocks = malloc((piece_count * RUN + 1) * sizeof *blocks);
    on_all_cores(compress_pieces);
    if (restore) {
        block_count = packed_count;
        qsort(blocks, block_count, sizeof *blocks, by_offset);
        began = now();
        out = open(words[3], O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (out < 0 || ftruncate(out, status.st_size) < 0) die(words[3]);
        on_all_cores(restore_blocks);
        if (fsync(out) < 0 || close(out) < 0) die("fsync");
    }
    printf("{\"seconds\": %.6f, \"bytes_in\": %llu, \"bytes_out\": %llu}\n", now() - began,
           (unsigned long long)bytes_in, (unsigned long long)bytes_out);
    return 0;
}
