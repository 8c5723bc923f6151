/* An allocator for PyTorch's CPU tensors in which every access outside of a tensor's memory ends the process.
 *
 * PyTorch allocates with posix_memalign and an alignment of 64. Such allocations get pages of their own, with pages
 * before and behind them that can't be touched; freed ones can't be touched either, and none is used twice. The data
 * ends where its last page ends, but for the up to 63 bytes that keep it aligned; those are filled, and checked when
 * the tensor is freed, as are the bytes before it. New memory has a fill that can be changed, so that results that
 * depend on it can be told. All other allocations are glibc's.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

extern void *__libc_malloc(size_t);
extern void __libc_free(void *);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

#define PAGE 4096ul
#define GUARD (16 * PAGE)
#define REGION (1ul << 40) /* of addresses, not of memory */
#define MARK 0xB7

struct header { size_t size, pages; }; /* in a page of its own, before the first guard */

static char *region, *next;
static size_t live, limit;
static int fill;

/* Starts, with `bytes` as the limit of what is alive, and with this fill; fill < 0: stops. */
void guard_set(size_t bytes, int value) {
    if (!region) {
        void *found = mmap(0, REGION, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (found == MAP_FAILED) abort();
        region = next = found;
    }
    limit = bytes;
    fill = value;
}

static int guarded(const void *at) { return region && (char *)at >= region && (char *)at < region + REGION; }

static void *allocate(size_t size) {
    size_t pages = (size + PAGE - 1) / PAGE * PAGE + (size % PAGE ? 0 : PAGE * !size);
    if (size > limit || live + pages > limit || next + pages + 2 * GUARD + PAGE > region + REGION) return 0;
    char *head = next, *data = head + PAGE + GUARD;
    if (mprotect(head, PAGE, PROT_READ | PROT_WRITE) || mprotect(data, pages, PROT_READ | PROT_WRITE)) return 0;
    next = data + pages + GUARD;
    live += pages;
    *(struct header *)head = (struct header){size, pages};
    char *start = data + (pages - size) / 64 * 64;
    memset(data, MARK, start - data);
    memset(start, fill, size);
    memset(start + size, MARK, data + pages - start - size);
    return start;
}

static struct header *header_of(void *at) {
    char *page = (char *)((uintptr_t)at & ~(PAGE - 1));
    return (struct header *)(page - GUARD - PAGE); /* the data starts in its first page */
}

static void release(void *at) {
    struct header *head = header_of(at);
    char *data = (char *)head + PAGE + GUARD, *start = at;
    size_t pages = head->pages, size = head->size;
    for (char *p = data; p < data + pages; p++) {
        if (p == start) p += size;
        if (p < data + pages && *(unsigned char *)p != MARK) {
            static const char text[] = "guard: bytes beside a tensor were written to\n";
            (void)!write(2, text, sizeof text - 1);
            kill(getpid(), SIGBUS);
        }
    }
    live -= pages;
    madvise(data, pages, MADV_DONTNEED);
    mprotect(data, pages, PROT_NONE);
    madvise(head, PAGE, MADV_DONTNEED);
    mprotect(head, PAGE, PROT_NONE);
}

int posix_memalign(void **result, size_t alignment, size_t size) {
    void *found = alignment == 64 && region && fill >= 0 ? allocate(size) : __libc_memalign(alignment, size);
    if (!found) return ENOMEM;
    *result = found;
    return 0;
}

void free(void *at) {
    if (!guarded(at)) __libc_free(at);
    else release(at);
}

void *realloc(void *at, size_t size) {
    if (!guarded(at)) return __libc_realloc(at, size);
    void *found = __libc_malloc(size);
    size_t old = header_of(at)->size;
    if (found) {
        memcpy(found, at, old < size ? old : size);
        release(at);
    }
    return found;
}
