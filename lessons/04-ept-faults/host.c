/* Lesson 4, host half: where the guest's memory comes from, and what happens when it is not there. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "host.h"
#include "lab.h"

/* A piece of guest memory, or of what may become one. */
struct region {
    uint32_t slot;  /* its number for KVM: one for each region */
    uint32_t flags; /* KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY */
    gpa_t gpa;
    uint64_t size; /* bytes; whole pages */
    uint8_t *hva;  /* the memory behind it, in this process */
};

/* Given below. */
static struct region *region_at(gpa_t gpa); /* the region that has this gpa; NULL: none has */
static uint8_t *frame_alloc(void);          /* a page of memory for one more frame */
static const uint8_t *source_at(gpa_t gpa); /* what belongs into the page at gpa, page-aligned */
static int uffd_copy(struct uffdio_copy *copy);

/* ---- what you write ---- */

/* Tell KVM: the gpas of this region are backed by the memory at its hva. KVM_SET_USER_MEMORY_REGION takes a
 * struct kvm_userspace_memory_region. */
static void slot_set(const struct region *region) {
    /* BEGIN SOLUTION */
    struct kvm_userspace_memory_region slot = {.slot = region->slot,
                                               .flags = region->flags,
                                               .guest_phys_addr = region->gpa,
                                               .memory_size = region->size,
                                               .userspace_addr = (uintptr_t)region->hva};
    host_vm(KVM_SET_USER_MEMORY_REGION, &slot);
    /* STUB
    (void)region;
    HOST_TODO("slot_set: tell KVM which memory is behind the gpas of this region");
    END SOLUTION */
}

/*
 * The guest has accessed a gpa of this region, and no slot is there yet. Make it one, so that the next
 * access anywhere in the region is memory.
 *
 * This access is not repeated. KVM has decoded the instruction and left for the VMM what it lacks: for
 * a read, put access->size bytes from the region's memory into access->data, and KVM moves them to the
 * register; for a write, the bytes are in access->data, and nobody but you will put them into the
 * region's memory. That memory begins at region->hva; host_memory() knows nothing of it.
 */
static void absent_serve(const struct region *region, struct access *access) {
    /* BEGIN SOLUTION */
    uint8_t *hva = region->hva + (access->address - region->gpa);
    uint8_t *to = access->is_write ? hva : access->data;
    const uint8_t *from = access->is_write ? access->data : hva;
    slot_set(region);
    memcpy(to, from, access->size);
    /* STUB
    (void)region, (void)access;
    HOST_TODO("absent_serve: add the slot, and do the access that has exited");
    END SOLUTION */
}

/*
 * On the second thread: somebody waits for the page at this hva, which lies in the memory of the region
 * and is page-aligned; here it is the vCPU, in the middle of KVM_RUN. Supply this one page: UFFDIO_COPY,
 * with a struct uffdio_copy, makes it, fills it and puts it in place in one step. Its content is
 * source_at() of its gpa. Whoever touches the page before that waits for it, and so would you.
 */
static void page_serve(const struct region *region, uint64_t hva) {
    /* BEGIN SOLUTION */
    const uint8_t *source = source_at(region->gpa + (hva - (uintptr_t)region->hva));
    struct uffdio_copy copy = {.dst = hva, .src = (uintptr_t)source, .len = PAGE_SIZE};
    uffd_copy(&copy);
    /* STUB
    (void)region, (void)hva, (void)source_at, (void)uffd_copy;
    HOST_TODO("page_serve: supply the page that is missing at this hva");
    END SOLUTION */
}

/*
 * The same, but supply the block of 64 KiB around it: BLOCK_SIZE bytes from a gpa that is a multiple of
 * BLOCK_SIZE, as far as they lie in the region. Pages of the block that are there already stay as they
 * are: UFFDIO_COPY refuses them (EEXIST), and stops there if it was to copy more than one.
 */
static void block_serve(const struct region *region, uint64_t hva) {
    /* BEGIN SOLUTION */
    gpa_t gpa = region->gpa + (hva - (uintptr_t)region->hva);
    gpa_t start_gpa = gpa & ~(BLOCK_SIZE - 1);
    for (unsigned i = 0; i < BLOCK_PAGES; i++) {
        gpa_t page_gpa = start_gpa + i * PAGE_SIZE;
        if (page_gpa >= region->gpa && page_gpa < region->gpa + region->size)
            page_serve(region, (uintptr_t)region->hva + (page_gpa - region->gpa));
    }
    /* STUB
    (void)region, (void)hva;
    HOST_TODO("block_serve: supply the block of 64 KiB around this hva");
    END SOLUTION */
}

/*
 * Copy on write: the guest writes to this region of one page. Its slot is read-only, since others share
 * its frame. Give it a frame of its own (frame_alloc) with the same content, let region->hva and its
 * slot say so, and do the write.
 *
 * KVM changes neither the memory behind a slot nor its KVM_MEM_READONLY. But a slot can be removed, by a
 * size of 0, and set anew.
 */
static void write_serve(struct region *region, struct access *access) {
    /* BEGIN SOLUTION */
    uint8_t *frame = frame_alloc();
    memcpy(frame, region->hva, PAGE_SIZE);
    memcpy(frame + (access->address - region->gpa), access->data, access->size);
    slot_set(&(struct region){.slot = region->slot});
    region->hva = frame;
    region->flags &= ~KVM_MEM_READONLY;
    slot_set(region);
    /* STUB
    (void)region, (void)access, (void)frame_alloc;
    HOST_TODO("write_serve: give the page a frame of its own, and do the write there");
    END SOLUTION */
}

/*
 * Which pages of this region has the guest written to since the last time? Bit i of the bitmap, 64 bits
 * in each of its words, is for page i. KVM_GET_DIRTY_LOG (struct kvm_dirty_log) tells. It resets nothing,
 * since the lab has enabled KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: KVM_CLEAR_DIRTY_LOG (struct
 * kvm_clear_dirty_log) does, for the pages of a bitmap, so that the next log has only what is new. Its
 * num_pages is a multiple of 64, or ends with the slot.
 */
static void dirty_collect(const struct region *region, uint64_t *bitmap) {
    /* BEGIN SOLUTION */
    struct kvm_dirty_log log = {.slot = region->slot, .dirty_bitmap = bitmap};
    struct kvm_clear_dirty_log clear = {.slot = region->slot,
                                        .num_pages = (uint32_t)(region->size / PAGE_SIZE),
                                        .dirty_bitmap = bitmap};
    host_vm(KVM_GET_DIRTY_LOG, &log);
    host_vm(KVM_CLEAR_DIRTY_LOG, &clear);
    /* STUB
    (void)region, (void)bitmap;
    HOST_TODO("dirty_collect: read the log of dirty pages, and reset it");
    END SOLUTION */
}

/* Let the region begin at another gpa from now on, with all that is in it: the same slot, moved. The lab
 * looks at region->gpa (region_at): it must say so, too. */
static void region_move(struct region *region, gpa_t gpa) {
    /* BEGIN SOLUTION */
    region->gpa = gpa; /* all else is as before: KVM moves it */
    slot_set(region);
    /* STUB
    (void)region, (void)gpa;
    HOST_TODO("region_move: the same slot and memory, at another gpa");
    END SOLUTION */
}

/* Let nothing be at the gpas of this region any more: no slot, and a region->size of 0, which tells the lab. */
static void region_remove(struct region *region) {
    /* BEGIN SOLUTION */
    region->size = 0; /* and so KVM removes it */
    slot_set(region);
    /* STUB
    (void)region;
    HOST_TODO("region_remove: a slot of size 0 is none");
    END SOLUTION */
}

/*
 * KVM_RUN has failed: the guest needs the page at this gpa, there is a slot, but the process may not
 * touch the memory behind it. Give this one page back to the process, readable and writable, with what
 * was in it: mprotect(). True: the guest can repeat its access. A gpa of no region is not yours: false.
 */
static bool fault_mend(gpa_t gpa) {
    /* BEGIN SOLUTION */
    const struct region *region = region_at(gpa);
    if (!region)
        return false;
    uint64_t offset = (gpa - region->gpa) & ~(PAGE_SIZE - 1);
    return mprotect(region->hva + offset, PAGE_SIZE, PROT_READ | PROT_WRITE) == 0;
    /* STUB
    (void)gpa;
    HOST_TODO("fault_mend: give the page behind this gpa back to the process");
    END SOLUTION */
}

/* ---- the rest is given: the lab, and the second thread ---- */

#define PAGES_MAX 128   /* of a region */
#define FRAMES 16       /* for copies on write */
#define LOG_MAX 512     /* what the second thread does in a stage */
#define COPIES_MAX 256  /* for one fault */
#define PAGES_TEXT 1024 /* bytes: the page numbers of a region */
#define SERVE_SECONDS 4 /* for one fault */
#define REPEATS_MAX 8   /* of a memory fault at the same gpa */

static struct plan plan;

static struct {
    struct region regions[REGIONS];
    uint8_t *on_demand; /* the memory of REGION_BLOCK and, right behind it, of REGION_PAGE */
    uint8_t *frames;
    unsigned frames_used;
    uint8_t *shared; /* the frame of all read-only slots */
    gpa_t script_gpa;
    gpa_t last_fault_gpa;
    unsigned repeats;
} lab;

static bool is_absent(const struct region *region) {
    return region >= &lab.regions[REGION_ABSENT] && region < &lab.regions[REGION_PAGE];
}

static bool is_cow(const struct region *region) {
    return region >= &lab.regions[REGION_COW] && region < &lab.regions[REGION_DIRTY];
}

static struct region *region_at(gpa_t gpa) {
    for (unsigned i = 0; i < REGIONS; i++)
        if (gpa >= lab.regions[i].gpa && gpa - lab.regions[i].gpa < lab.regions[i].size)
            return &lab.regions[i];
    return NULL;
}

static uint8_t *memory_map(uint64_t size) {
    uint8_t *hva = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (hva == MAP_FAILED)
        host_cannot("there is no memory left for the lab");
    return hva;
}

/* REGION_BLOCK begins at a multiple of BLOCK_SIZE in this process, as it never does among the gpas. */
static uint8_t *on_demand_map(void) {
    uint64_t pages = plan.regions[REGION_BLOCK].pages + plan.regions[REGION_PAGE].pages;
    uint8_t *hva = memory_map(pages * PAGE_SIZE + BLOCK_SIZE);
    return hva + (-(uintptr_t)hva & (BLOCK_SIZE - 1));
}

static uint8_t *frame_alloc(void) {
    unsigned frame = lab.frames_used++;
    return lab.frames + PAGE_SIZE * (frame < FRAMES ? frame : FRAMES - 1);
}

static void content_fill(uint8_t *hva, gpa_t gpa, uint64_t size) {
    for (uint64_t at = 0; at < size; at += sizeof(uint64_t)) {
        uint64_t word = content_word(host_seed(), gpa + at);
        memcpy(hva + at, &word, sizeof word);
    }
}

/* ---- the second thread ---- */

/* What it has done, for the VMM's thread to record. */
struct log_entry {
    const char *what; /* "fault", "copy", "gave up", "unserved" */
    uint64_t hva;
    uint64_t size; /* of a copy */
    int error;
    unsigned times; /* in a row */
};

static struct {
    int uffd, stop;
    timer_t watch;
    const char *serving; /* the function that the watch is for */
    pthread_t thread;
    pthread_mutex_t lock; /* of all below */
    struct log_entry log[LOG_MAX];
    unsigned logged;
    unsigned copies; /* for the fault that is being served */
} server = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* The region whose memory is at this address of the process; those of userfaultfd only. */
static struct region *region_of(uint64_t address) {
    static const enum region_name names[] = {REGION_PAGE, REGION_BLOCK};
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
        struct region *region = &lab.regions[names[i]];
        if (address - (uintptr_t)region->hva < region->size)
            return region;
    }
    return NULL;
}

static const uint8_t *source_at(gpa_t gpa) {
    static uint8_t page[PAGE_SIZE];
    content_fill(page, gpa & ~(PAGE_SIZE - 1), PAGE_SIZE);
    return page;
}

static void log_add(const char *what, uint64_t hva, uint64_t size, int error) {
    struct log_entry *last = server.logged ? &server.log[server.logged - 1] : NULL;
    if (last && last->what == what && last->hva == hva && last->size == size &&
        last->error == error)
        last->times++;
    else if (server.logged < LOG_MAX)
        server.log[server.logged++] = (struct log_entry){what, hva, size, error, 1};
}

/*
 * UFFDIO_COPY, of one page: 0, or the errno with which it failed, EEXIST if there is one already. It
 * would wake who waits for the page; here the lab wakes the guest when you are done, so that what you
 * did is on record before the guest does anything more.
 */
static int uffd_copy(struct uffdio_copy *copy) {
    if (++server.copies == COPIES_MAX + 1)
        log_add("gave up", copy->dst, 0, 0);
    if (server.copies > COPIES_MAX) /* a loop that waits for success: let it end */
        return 0;
    copy->mode |= UFFDIO_COPY_MODE_DONTWAKE;
    int error = ioctl(server.uffd, UFFDIO_COPY, copy) < 0 ? errno : 0;
    log_add("copy", copy->dst, copy->len, error);
    return error;
}

static bool page_is_there(const uint8_t *hva) {
    unsigned char resident;
    return mincore((void *)hva, PAGE_SIZE, &resident) == 0 && (resident & 1);
}

/* While the guest waits, KVM_RUN need not notice the VMM's time limit: not before Linux 6.2. So a function
 * that does not come back has a limit of its own. It is for yet another thread to tell: this one may wait
 * in the kernel for a page that only itself would supply. */
static void serve_late(union sigval unused) {
    char what[128];
    (void)unused;
    snprintf(what, sizeof what,
             "%s() in host.c has not come back: a loop, or it touches the page that is missing, "
             "and waits",
             server.serving);
    host_stuck(what);
}

static void watch_set(const char *function) {
    struct itimerspec limit = {.it_value.tv_sec = function ? SERVE_SECONDS : 0};
    server.serving = function;
    timer_settime(server.watch, 0, &limit, NULL);
}

static void fault_serve(uint64_t address) {
    const struct region *region = region_of(address);
    uint64_t page = address & ~(PAGE_SIZE - 1);
    struct uffdio_zeropage zero = {.range = {page, PAGE_SIZE}};
    pthread_mutex_lock(&server.lock);
    log_add("fault", page, 0, 0);
    server.copies = 0;
    watch_set(region == &lab.regions[REGION_PAGE] ? "page_serve" : "block_serve");
    if (region == &lab.regions[REGION_PAGE])
        page_serve(region, page);
    else if (region)
        block_serve(region, page);
    watch_set(NULL);
    if (!page_is_there((const uint8_t *)page)) { /* or the guest would wait for ever */
        log_add("unserved", page, 0, 0);
        ioctl(server.uffd, UFFDIO_ZEROPAGE, &zero);
    }
    pthread_mutex_unlock(&server.lock);
    ioctl(server.uffd, UFFDIO_WAKE, &zero.range);
}

static void *server_run(void *unused) {
    struct sigevent late = {.sigev_notify = SIGEV_THREAD, .sigev_notify_function = serve_late};
    struct pollfd sources[] = {{.fd = server.uffd, .events = POLLIN},
                               {.fd = server.stop, .events = POLLIN}};
    timer_create(CLOCK_MONOTONIC, &late, &server.watch);
    while (poll(sources, 2, -1) > 0 && !sources[1].revents) {
        struct uffd_msg message;
        if (read(server.uffd, &message, sizeof message) == sizeof message &&
            message.event == UFFD_EVENT_PAGEFAULT)
            fault_serve(message.arg.pagefault.address);
    }
    return unused;
}

/* Faults of the kernel itself, and those of KVM are that, are not for everybody to serve: such a process
 * can keep the kernel waiting as long as it likes. */
static int uffd_open(void) {
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    int device = fd < 0 ? open("/dev/userfaultfd", O_RDWR | O_CLOEXEC) : -1;
    if (device >= 0) {
        fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        close(device);
    }
    if (fd < 0)
        host_cannot("its userfaultfd serves no faults of KVM for this user: be root, or "
                    "sudo sysctl vm.unprivileged_userfaultfd=1");
    return fd;
}

static void uffd_register(const struct region *region) {
    struct uffdio_register missing = {.range = {(uintptr_t)region->hva, region->size},
                                      .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(server.uffd, UFFDIO_REGISTER, &missing) < 0)
        host_cannot("its userfaultfd does not take anonymous memory");
}

/* Signals are for the VMM's thread, but for those by which a crash of this one is told. */
static void server_start(void) {
    sigset_t blocked;
    sigset_t before;
    sigfillset(&blocked);
    sigdelset(&blocked, SIGSEGV);
    sigdelset(&blocked, SIGBUS);
    sigdelset(&blocked, SIGFPE);
    server.stop = eventfd(0, EFD_CLOEXEC);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    if (pthread_create(&server.thread, NULL, server_run, NULL))
        host_cannot("it gives the VMM no second thread");
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void server_stop(void) {
    uint64_t one = 1;
    if (write(server.stop, &one, sizeof one) == sizeof one)
        pthread_join(server.thread, NULL);
    close(server.uffd);
    close(server.stop);
}

/* What UFFDIO_COPY can fail with: ioctl_userfaultfd(2). */
static const char *result_name(int error) {
    switch (error) {
    case 0: return "done";
    case EAGAIN: return "EAGAIN";
    case EEXIST: return "EEXIST";
    case EFAULT: return "EFAULT";
    case EINVAL: return "EINVAL";
    case ENOENT: return "ENOENT";
    default: return strerror(error);
    }
}

static void log_entry_record(const struct log_entry *entry) {
    const struct region *region = region_of(entry->hva);
    event_begin(entry->what);
    if (region) {
        event_hex("gpa", region->gpa + (entry->hva - (uintptr_t)region->hva));
    } else {
        event_hex("dst", entry->hva);
        event_string("region", "none has this hva");
    }
    if (entry->size) {
        event_hex("size", entry->size);
        event_string("result", result_name(entry->error));
    }
    if (entry->times > 1)
        event_number("times", entry->times);
    event_end();
}

/* The vCPU has waited for each fault, so they are in the order in which it ran into them. */
static void log_record(void) {
    pthread_mutex_lock(&server.lock);
    for (unsigned i = 0; i < server.logged; i++) {
        log_entry_record(&server.log[i]);
    }
    server.logged = 0;
    pthread_mutex_unlock(&server.lock);
}

/* ---- stages ---- */

static bool bit_of(const uint64_t *bitmap, uint64_t bit) {
    return bitmap[bit / 64] >> bit % 64 & 1;
}

/* The pages whose bits are set, by their numbers: "0 to 3, 7". */
static void pages_record(const char *kind, const uint64_t *bitmap, uint64_t pages) {
    char text[PAGES_TEXT] = "none";
    int length = 0;
    for (uint64_t page = 0; page < pages; page++) {
        uint64_t first = page;
        while (page < pages && bit_of(bitmap, page))
            page++;
        if (page > first)
            length += sprintf(text + length, "%s%" PRIu64, length ? ", " : "", first);
        if (page > first + 1)
            length += sprintf(text + length, " to %" PRIu64, page - 1);
    }
    event_begin(kind);
    event_string("pages", text);
    event_end();
}

static void presence_record(const struct region *region) {
    uint64_t there[PAGES_MAX / 64] = {0};
    for (uint64_t i = 0; i < region->size / PAGE_SIZE; i++)
        if (page_is_there(region->hva + i * PAGE_SIZE))
            there[i / 64] |= UINT64_C(1) << i % 64;
    pages_record("there", there, region->size / PAGE_SIZE);
}

/* The host itself has been here before the guest, and has left other words than source_at() has. */
static void early_supply(const struct region *region) {
    uint8_t page[PAGE_SIZE];
    for (uint64_t i = 0; i < region->size / PAGE_SIZE; i++) {
        if (!bit_of(plan.early, i))
            continue;
        content_fill(page, ~(region->gpa + i * PAGE_SIZE), PAGE_SIZE);
        struct uffdio_copy copy = {.dst = (uintptr_t)region->hva + i * PAGE_SIZE,
                                   .src = (uintptr_t)page,
                                   .len = PAGE_SIZE};
        ioctl(server.uffd, UFFDIO_COPY, &copy);
    }
    pages_record("early", plan.early, region->size / PAGE_SIZE);
}

static void slots_share(void) {
    for (unsigned i = REGION_COW; i < REGION_COW + COW_REGIONS; i++) {
        lab.regions[i].hva = lab.shared;
        lab.regions[i].flags = KVM_MEM_READONLY;
        slot_set(&lab.regions[i]);
    }
}

static void dirty_record(void) {
    uint64_t bitmap[PAGES_MAX / 64] = {0};
    const struct region *region = &lab.regions[REGION_DIRTY];
    dirty_collect(region, bitmap);
    pages_record("dirty", bitmap, region->size / PAGE_SIZE);
}

/* Memory may go any time: another process of the host needs it, or the VMM itself. */
static void pages_take(const struct region *region) {
    for (uint64_t i = 0; i < region->size / PAGE_SIZE; i++)
        if (bit_of(&plan.taken, i))
            mprotect(region->hva + i * PAGE_SIZE, PAGE_SIZE, PROT_NONE);
    pages_record("taken", &plan.taken, region->size / PAGE_SIZE);
}

/* May the process read and write this page? System calls answer with EFAULT where an access of our own
 * would crash. What is read back is the byte that was written. */
static bool page_is_ours(uint8_t *hva) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC))
        return false;
    bool is_ours = write(ends[1], hva, 1) == 1 && read(ends[0], hva, 1) == 1;
    close(ends[0]);
    close(ends[1]);
    return is_ours;
}

static void still_taken_record(const struct region *region) {
    uint64_t taken = 0;
    for (uint64_t i = 0; i < region->size / PAGE_SIZE; i++)
        if (!page_is_ours(region->hva + i * PAGE_SIZE))
            taken |= UINT64_C(1) << i;
    pages_record("still taken", &taken, region->size / PAGE_SIZE);
}

/* Is fault_mend() asked for a gpa of no region, that of the device, it says so. */
static void nowhere_mend(void) {
    gpa_t gpa = plan.regions[REGION_DEVICE].gpa;
    bool is_mended = fault_mend(gpa);
    event_begin("nowhere");
    event_hex("gpa", gpa);
    event_number("is_mended", is_mended);
    event_end();
}

static void shared_record(void) {
    uint8_t page[PAGE_SIZE];
    content_fill(page, lab.regions[REGION_COW].gpa, PAGE_SIZE);
    event_begin("shared");
    event_number("is_unchanged", !memcmp(page, lab.shared, PAGE_SIZE));
    event_number("frames", lab.frames_used);
    event_end();
}

/* What a function has left in its region: the lab goes by that. */
static void region_after_record(const char *function, const struct region *region) {
    event_begin("region after");
    event_string("function", function);
    event_number("slot", region->slot);
    event_hex("gpa", region->gpa);
    event_hex("size", region->size);
    event_number("is_shared", region->hva == lab.shared);
    event_end();
}

static void stage_prepare(enum stage stage) {
    struct region *moving = &lab.regions[REGION_MOVING];
    switch (stage) {
    case STAGE_TOUCH: slot_set(&lab.regions[REGION_TOUCH]); break;
    case STAGE_PAGE: slot_set(&lab.regions[REGION_PAGE]); break;
    case STAGE_BLOCK:
        early_supply(&lab.regions[REGION_BLOCK]);
        slot_set(&lab.regions[REGION_BLOCK]);
        break;
    case STAGE_COW: slots_share(); break;
    case STAGE_SETTLE: slot_set(&lab.regions[REGION_DIRTY]); break;
    case STAGE_PLACED: slot_set(moving); break;
    case STAGE_MOVED:
        region_move(moving, plan.regions[REGION_MOVED].gpa);
        region_after_record("region_move", moving);
        break;
    case STAGE_REMOVED:
        region_remove(moving);
        region_after_record("region_remove", moving);
        break;
    case STAGE_GIVEN: slot_set(&lab.regions[REGION_TAKEN]); break;
    case STAGE_TAKEN: pages_take(&lab.regions[REGION_TAKEN]); break;
    default: break;
    }
}

static void stage_inspect(enum stage stage) {
    switch (stage) {
    case STAGE_PAGE: presence_record(&lab.regions[REGION_PAGE]); break;
    case STAGE_BLOCK: presence_record(&lab.regions[REGION_BLOCK]); break;
    case STAGE_COW: shared_record(); break;
    case STAGE_SETTLE:
    case STAGE_DIRTY:
    case STAGE_DIRTY_2:
    case STAGE_DIRTY_3: dirty_record(); break;
    case STAGE_TAKEN:
        still_taken_record(&lab.regions[REGION_TAKEN]);
        nowhere_mend();
        break;
    default: break;
    }
}

static void stage_record(const char *kind, enum stage stage) {
    event_begin(kind);
    event_string("stage", stage_names[stage]);
    event_end();
    host_statistics(stage_names[stage]);
}

/* What the guest has accessed; what it has read is in its script. */
static void accesses_record(enum stage stage) {
    const struct step *script = host_memory(lab.script_gpa, sizeof plan.step[stage]);
    for (unsigned i = 0; script && i < plan.steps[stage]; i++) {
        event_begin("access");
        event_string("stage", stage_names[stage]);
        event_hex("gpa", plan.step[stage][i].gpa);
        event_number("is_write", plan.step[stage][i].is_write);
        event_hex("value", script[i].value);
        event_end();
    }
}

static void stage_begin(enum stage stage) {
    stage_prepare(stage);
    stage_record("begin", stage);
}

static void stage_end(enum stage stage) {
    stage_record("over", stage);
    log_record();
    accesses_record(stage);
    stage_inspect(stage);
}

static void lab_access(struct access *access) {
    uint32_t value = 0;
    if (!access->is_write || access->size > sizeof value)
        return;
    memcpy(&value, access->data, access->size);
    if (access->address == LAB_SCRIPT)
        lab.script_gpa = value;
    else if (access->address == LAB_BEGIN && value < STAGES)
        stage_begin((enum stage)value);
    else if (access->address == LAB_END && value < STAGES)
        stage_end((enum stage)value);
}

/* ---- accesses to what is no memory ---- */

/* A register that reads as the seed says, and takes every write. */
static void device_access(struct access *access) {
    uint64_t word = content_word(host_seed(), access->address);
    if (!access->is_write)
        memcpy(access->data, &word, access->size < sizeof word ? access->size : sizeof word);
}

/* Where REGION_MOVING is for a time, an access that exits finds an empty bus: data has all its bits set, as
 * the VMM left it. */
static bool is_hole(gpa_t gpa) {
    for (unsigned i = 0; i < 2; i++) {
        enum region_name name = i == 0 ? REGION_MOVING : REGION_MOVED;
        if (gpa >= plan.regions[name].gpa &&
            gpa - plan.regions[name].gpa < plan.regions[name].pages * PAGE_SIZE)
            return true;
    }
    return false;
}

static bool lab_memory_event(struct access *access) {
    struct region *region = region_at(access->address);
    if (is_hole(access->address))
        return true;
    if (region && is_cow(region) && access->is_write) {
        write_serve(region, access);
        region_after_record("write_serve", region);
    } else if (region && is_absent(region)) {
        absent_serve(region, access);
    } else {
        return false; /* there should be a slot */
    }
    return true;
}

/* Where KVM does not say which page it was, the plan does: the next one that the guest misses. */
static gpa_t fault_gpa_guess(void) {
    const struct region *region = &lab.regions[REGION_TAKEN];
    for (unsigned i = 0; i < plan.steps[STAGE_TAKEN]; i++) {
        uint64_t offset = (plan.step[STAGE_TAKEN][i].gpa - region->gpa) & ~(PAGE_SIZE - 1);
        if (!page_is_ours(region->hva + offset))
            return region->gpa + offset;
    }
    return HOST_GPA_UNKNOWN;
}

static bool lab_memory_fault(gpa_t gpa) {
    bool is_told = gpa != HOST_GPA_UNKNOWN;
    if (!is_told)
        gpa = fault_gpa_guess();
    lab.repeats = gpa == lab.last_fault_gpa ? lab.repeats + 1 : 1;
    lab.last_fault_gpa = gpa;
    bool is_mended = fault_mend(gpa) && lab.repeats < REPEATS_MAX;
    event_begin("memory fault");
    event_hex("gpa", gpa);
    event_string("told_by", is_told ? "KVM" : "the plan");
    event_number("in_a_row", lab.repeats);
    event_number("is_mended", is_mended);
    event_end();
    return is_mended;
}

/* ---- setup ---- */

static void region_make(enum region_name name) {
    struct region *region = &lab.regions[name];
    if (name == REGION_DEVICE || name == REGION_MOVED)
        return;
    *region = (struct region){.slot = HOST_SLOT_FIRST + (uint32_t)name,
                              .gpa = plan.regions[name].gpa,
                              .size = plan.regions[name].pages * PAGE_SIZE};
    if (is_cow(region)) /* slots_share() */
        return;
    if (name == REGION_PAGE || name == REGION_BLOCK) {
        bool is_behind = name == REGION_PAGE;
        region->hva = lab.on_demand + is_behind * plan.regions[REGION_BLOCK].pages * PAGE_SIZE;
        uffd_register(region);
        return;
    }
    region->hva = memory_map(region->size);
    if (name != REGION_TOUCH)
        content_fill(region->hva, region->gpa, region->size);
}

static void region_record(enum region_name name) {
    event_begin("region");
    event_number("region", name);
    event_hex("gpa", plan.regions[name].gpa);
    event_number("pages", plan.regions[name].pages);
    event_end();
}

static void lab_setup(void) {
    struct uffdio_api api = {.api = UFFD_API};
    struct kvm_enable_cap manual = {.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                                    .args = {KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE}};
    plan_make(&plan, host_seed());
    server.uffd = uffd_open();
    if (ioctl(server.uffd, UFFDIO_API, &api) < 0)
        host_cannot("its userfaultfd speaks another language");
    lab.on_demand = on_demand_map();
    for (unsigned name = 0; name < REGIONS; name++) {
        region_make(name);
        region_record(name);
    }
    lab.regions[REGION_DIRTY].flags = KVM_MEM_LOG_DIRTY_PAGES;
    lab.frames = memory_map(FRAMES * PAGE_SIZE);
    lab.shared = memory_map(PAGE_SIZE);
    content_fill(lab.shared, plan.regions[REGION_COW].gpa, PAGE_SIZE);
    host_vm(KVM_ENABLE_CAP, &manual);
    host_claim_pio(LAB_SCRIPT, LAB_END - LAB_SCRIPT + 1, "lab", lab_access);
    host_claim_mmio(plan.regions[REGION_DEVICE].gpa, PAGE_SIZE, "lab device", device_access);
    server_start();
}

static void lab_end(void) { server_stop(); }

const struct host_half host_half = {.setup = lab_setup,
                                    .memory_event = lab_memory_event,
                                    .memory_fault = lab_memory_fault,
                                    .end = lab_end};
