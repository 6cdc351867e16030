/*
 * The first process of an emulated machine; tools/kvmlab/machine.py is the other side of everything
 * here. It loads Debian's KVM modules, says that it is ready, and runs one job after the other: some
 * files and a command. Linked statically, it is /init of the initial RAM file system, in which there
 * is nothing else but the modules.
 *
 * Jobs come in on the first IDE disk, which is read by port I/O: that needs no driver, is the same in
 * QEMU and in Bochs, and what the host has written to the disk's file is there at the next read. The
 * first sector holds a struct job_header, read again and again until its number changes. Behind it
 * are the records of the job, each a struct record and its bytes, padded to a multiple of 4.
 *
 * Answers go out through the parallel port, which both emulators write to a file, as frames: a struct
 * frame and its bytes. (Port 0xe9 would be quicker, but there Bochs' debugger has its say too.) The
 * files that the command leaves are too much for a port of one byte: they are
 * written to the disk from RESULTS_AT on, one behind the other, each padded to whole blocks.
 *
 * Registers and commands of the disk: ATA/ATAPI-7, "PIO data-in command protocol" and "PIO data-out
 * command protocol".
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* ================================ The contract with the host ================================ */

#define READY "\nkvmlab machine: ready\n" /* on the parallel port, before the first frame */
#define BROKEN "\nkvmlab machine: "       /* or this and a reason, and the machine is of no use */

enum {
    GO = 0xe9, /* a port that reads as anything else while the machine is about to be saved: no
                  command may be on its way to the disk then */
    SECTOR = 512,
    BLOCK = 16 * SECTOR,     /* what the disk hands over at once */
    JOB_MOST = 63 << 20,     /* bytes of all records */
    RESULTS_AT = 64 << 20,   /* offset on the disk */
    RESULT_MOST = 16 << 20,  /* bytes of one result; a longer one loses its middle, */
    RESULT_TAIL = 256 << 10, /* but not these last bytes */
    RESULTS = 8,
    ARGUMENTS = 32,
};

struct job_header {
    char magic[8]; /* JOB_MAGIC */
    uint64_t number;
    uint64_t size; /* bytes of all records */
};

#define JOB_MAGIC "kvmlab 1"

enum record_kind {
    RECORD_ARGUMENT = 1,      /* the next word of the command */
    RECORD_FILE = 2,          /* a name in the folder that the command starts in; */
    RECORD_CONTENT = 3,       /* what is in that file. The command's input is the file "stdin" */
    RECORD_RESULT = 4,        /* name of a file that is wanted back */
    RECORD_KVM_PARAMS = 5,    /* parameters of the module kvm, */
    RECORD_VENDOR_PARAMS = 6, /* and of kvm_amd or kvm_intel */
    RECORD_TRACE = 7,         /* KVM's tracepoints are wanted, as one more result */
};

struct record {
    uint32_t kind;
    uint32_t size;
};

enum frame_kind {
    FRAME_OUTPUT = 1,
    FRAME_ERRORS = 2,
    FRAME_REFUSED = 3, /* text: why the job was not run; the last frame of its job */
    FRAME_DONE = 4,    /* struct done: the last frame of its job */
};

struct frame {
    uint32_t kind;
    uint32_t size;
};

struct done {
    int64_t status;         /* of the command; negative: the signal that ended it */
    int64_t sizes[RESULTS]; /* of the kernel's messages, the trace, and the files in the order
                               asked for; -1: there is none */
};

static const struct timespec a_while = {.tv_nsec = 2000000};

/* ================================ Ports ================================ */

enum {
    PARALLEL_DATA = 0x378,
    PARALLEL_CONTROL = 0x37a,
    CONTROL_IDLE = 0x0c, /* the printer is selected, and not being reset */
    CONTROL_STROBE = 0x0d,
};

static void send_bytes(const void *bytes, size_t size) {
    for (size_t i = 0; i < size; i++) {
        /* The analyzer takes the single bytes of a struct for undefined.
         * NOLINTNEXTLINE(clang-analyzer-core.CallAndMessage) */
        outb(((const uint8_t *)bytes)[i], PARALLEL_DATA);
        outb(CONTROL_STROBE, PARALLEL_CONTROL);
        outb(CONTROL_IDLE, PARALLEL_CONTROL);
    }
}

/* Those of <sys/io.h> do not tell the compiler that they read and write memory. */
static void port_send_words(uint16_t port, const void *words, size_t count) {
    asm volatile("rep outsl" : "+S"(words), "+c"(count) : "d"(port) : "memory");
}

static void port_receive_words(uint16_t port, void *words, size_t count) {
    asm volatile("rep insl" : "+D"(words), "+c"(count) : "d"(port) : "memory");
}

static void send_frame(enum frame_kind kind, const void *bytes, size_t size) {
    struct frame frame = {kind, (uint32_t)size};
    send_bytes(&frame, sizeof frame);
    send_bytes(bytes, size);
}

static bool is_ready;

/* The kernel panics when its first process ends, and the emulator with it. */
__attribute__((noreturn)) static void broken(const char *what) {
    char text[200];
    snprintf(text, sizeof text, "%s: %s\n", what, strerror(errno));
    if (is_ready) {
        send_frame(FRAME_REFUSED, text, strlen(text));
    } else {
        send_bytes(BROKEN, strlen(BROKEN));
        send_bytes(text, strlen(text));
    }
    exit(1);
}

/* ================================ The disk ================================ */

enum {
    DISK_DATA = 0x1f0,
    DISK_COUNT = 0x1f2, /* of sectors; then the first one's number in four pieces */
    DISK_COMMAND = 0x1f7,
    DISK_STATUS = 0x1f7,
    STATUS_BUSY = 0x80,
    STATUS_DATA_REQUEST = 0x08,
    STATUS_ERROR = 0x01,
    SELECT_FIRST_BY_NUMBER = 0xe0,
    SET_MULTIPLE_MODE = 0xc6, /* how many sectors the next two move without a pause */
    READ_MULTIPLE = 0xc4,
    WRITE_MULTIPLE = 0xc5,
};

static uint8_t disk_wait(void) {
    uint8_t status;
    while ((status = inb(DISK_STATUS)) & STATUS_BUSY)
        continue;
    if (status & STATUS_ERROR) {
        errno = EIO;
        broken("the disk");
    }
    return status;
}

static void disk_command(uint8_t command, size_t sector, uint8_t count) {
    disk_wait();
    outb(count, DISK_COUNT);
    for (int piece = 0; piece < 3; piece++)
        outb((uint8_t)(sector >> 8 * piece), DISK_COUNT + 1 + piece);
    outb(SELECT_FIRST_BY_NUMBER | (sector >> 24 & 15), DISK_COUNT + 4);
    outb(command, DISK_COMMAND);
}

/* Move this many bytes, rounded up to whole blocks. */
static void disk_transfer(uint8_t command, size_t offset, uint8_t *bytes, size_t size) {
    for (size_t at = 0; at < size; at += BLOCK) {
        disk_command(command, (offset + at) / SECTOR, BLOCK / SECTOR);
        while (!(disk_wait() & STATUS_DATA_REQUEST))
            continue;
        if (command == READ_MULTIPLE)
            port_receive_words(DISK_DATA, bytes + at, BLOCK / 4);
        else
            port_send_words(DISK_DATA, bytes + at, BLOCK / 4);
    }
    disk_wait(); /* until the last block is written, too */
}

/* ================================ Files ================================ */

static void file_write(const char *path, const void *bytes, size_t size) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0755);
    for (size_t at = 0; fd >= 0 && at < size;) {
        ssize_t written = write(fd, (const uint8_t *)bytes + at, size - at);
        if (written <= 0)
            break;
        at += (size_t)written;
    }
    close(fd);
}

static void text_write(const char *path, const char *text) { file_write(path, text, strlen(text)); }

static uint8_t result_bytes[RESULT_MOST + BLOCK];

/* Put the bytes of a file into result_bytes: their number, or -1 if there is no file. Those of tracefs
 * do not say their size before. */
static int64_t result_read(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    size_t size = 0;
    ssize_t got;
    while (size < RESULT_MOST && (got = read(fd, result_bytes + size, RESULT_MOST - size)) > 0)
        size += (size_t)got;
    if (lseek(fd, 0, SEEK_END) > RESULT_MOST && lseek(fd, -RESULT_TAIL, SEEK_END) > 0 &&
        (got = read(fd, result_bytes + RESULT_MOST - RESULT_TAIL, RESULT_TAIL)) > 0)
        size = RESULT_MOST - RESULT_TAIL + (size_t)got;
    close(fd);
    return (int64_t)size;
}

/* ================================ KVM's modules ================================ */

static const char *vendor_module;  /* "kvm_amd" or "kvm_intel" */
static char loaded_params[2][256]; /* those of kvm and of the vendor's module that are loaded */

static bool module_load(const char *name, const char *params) {
    char path[64];
    snprintf(path, sizeof path, "/modules/%s.ko", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    bool loaded = fd >= 0 && syscall(SYS_finit_module, fd, params, 0) == 0;
    int error = errno;
    close(fd);
    errno = error;
    return loaded;
}

static bool modules_load(const char *kvm_params, const char *vendor_params) {
    bool loaded = module_load("kvm", kvm_params) && module_load(vendor_module, vendor_params);
    snprintf(loaded_params[0], sizeof loaded_params[0], "%s",
             loaded ? kvm_params : "none is loaded");
    snprintf(loaded_params[1], sizeof loaded_params[1], "%s", vendor_params);
    return loaded;
}

/* Make sure that KVM is loaded with these parameters: most often it is already. */
static bool modules_load_again(const char *kvm_params, const char *vendor_params) {
    if (!strcmp(kvm_params, loaded_params[0]) && !strcmp(vendor_params, loaded_params[1]))
        return true;
    syscall(SYS_delete_module, vendor_module, O_NONBLOCK);
    syscall(SYS_delete_module, "kvm", O_NONBLOCK);
    return modules_load(kvm_params, vendor_params);
}

/* ================================ The device for VFIO ================================ */

/* QEMU's edu (its docs/specs/edu), behind an IOMMU: only the machine that has the modules has it. */
#define EDU "/sys/bus/pci/devices/0000:00:02.0/"
#define EDU_IDS "ids=1234:11e8"

/*
 * Of this device QEMU saves nothing: in a machine that was restored it is as new, and its registers have no address.
 * But Linux suspends a device that nobody has opened. It saves its configuration then, and writes it back when
 * somebody opens the device.
 */
static bool edu_is_suspended(void) {
    char text[16] = "";
    int fd = open(EDU "power/runtime_status", O_RDONLY | O_CLOEXEC);
    ssize_t size = read(fd, text, sizeof text - 1);
    close(fd);
    return size > 0 && !strcmp(text, "suspended\n");
}

/* Each module needs those before it; the last takes the device. */
static void vfio_load(void) {
    if (access("/modules/vfio.ko", F_OK))
        return;
    if (!module_load("vfio", "") || !module_load("vfio_iommu_type1", "") ||
        !module_load("vfio_virqfd", "") || !module_load("vfio-pci-core", "") ||
        !module_load("vfio-pci", EDU_IDS))
        broken("VFIO cannot be loaded");
    for (int turn = 0; !edu_is_suspended(); turn++) {
        errno = EBUSY;
        if (turn == 1000)
            broken("the device for VFIO is not suspended");
        nanosleep(&a_while, NULL);
    }
}

/* ================================ KVM's tracepoints ================================ */

#define TRACING "/sys/kernel/tracing/"

/* VMM and trace use the same clock, so that their events can be merged. */
static void trace_start(void) {
    mount("tracefs", TRACING, "tracefs", 0, NULL);
    text_write(TRACING "trace_clock", "mono");
    text_write(TRACING "buffer_size_kb", "16384");
    text_write(TRACING "trace", "");
    text_write(TRACING "events/kvm/enable", "1");
    text_write(TRACING "events/kvm/kvm_fpu/enable",
               "0"); /* twice for each exit, and tells nothing */
}

static void trace_stop(void) { text_write(TRACING "events/kvm/enable", "0"); }

/* ================================ Jobs ================================ */

static uint8_t job_bytes[JOB_MOST + BLOCK];

struct job {
    char *arguments[ARGUMENTS + 1];
    const char *results[RESULTS];
    const char *kvm_params, *vendor_params;
    int argument_count, result_count;
    bool trace;
};

/* Names and arguments come with their final zero. */
static void job_record(struct job *job, uint32_t kind, char *bytes, uint32_t size) {
    static const char *file_name;
    switch (kind) {
    case RECORD_ARGUMENT:
        if (job->argument_count < ARGUMENTS)
            job->arguments[job->argument_count++] = bytes;
        break;
    case RECORD_FILE: file_name = bytes; break;
    case RECORD_CONTENT: file_write(file_name, bytes, size); break;
    case RECORD_RESULT:
        if (job->result_count < RESULTS - 2)
            job->results[job->result_count++] = bytes;
        break;
    case RECORD_KVM_PARAMS: job->kvm_params = bytes; break;
    case RECORD_VENDOR_PARAMS: job->vendor_params = bytes; break;
    case RECORD_TRACE: job->trace = true; break;
    default: break;
    }
}

static struct job job_unpack(size_t size) {
    struct job job = {.kvm_params = "", .vendor_params = ""};
    struct record record;
    for (size_t at = 0; at + sizeof record <= size; at += (record.size + 3) & ~3u) {
        memcpy(&record, job_bytes + at, sizeof record);
        at += sizeof record;
        job_record(&job, record.kind, (char *)job_bytes + at, record.size);
    }
    return job;
}

/* Wait for a job with another number than the last one's. */
static struct job job_next(void) {
    static uint64_t last;
    struct job_header header;
    while (inb(GO) != GO)
        nanosleep(&a_while, NULL);
    for (;;) {
        disk_transfer(READ_MULTIPLE, 0, job_bytes, BLOCK);
        memcpy(&header, job_bytes, sizeof header);
        if (!memcmp(header.magic, JOB_MAGIC, sizeof header.magic) && header.number != last)
            break;
        nanosleep(&a_while, NULL);
    }
    last = header.number;
    size_t size = header.size < JOB_MOST ? header.size : JOB_MOST;
    disk_transfer(READ_MULTIPLE, SECTOR, job_bytes, size);
    return job_unpack(size);
}

/* In the child: become the command. */
__attribute__((noreturn)) static void job_exec(const struct job *job, int output, int errors) {
    int input = open("stdin", O_RDONLY);
    dup2(input >= 0 ? input : open("/dev/null", O_RDONLY), 0);
    dup2(output, 1);
    dup2(errors, 2);
    iopl(0);
    if (job->argument_count)
        execv(job->arguments[0], job->arguments);
    perror("the command cannot be started");
    _exit(127);
}

/* Pass on what the command prints until it has ended, with all that it started; gives its status. */
static int job_follow(pid_t child, int output, int errors) {
    static uint8_t bytes[65536];
    static const enum frame_kind kinds[] = {FRAME_OUTPUT, FRAME_ERRORS};
    struct pollfd sources[] = {
        {.fd = output, .events = POLLIN},
        {.fd = errors, .events = POLLIN},
        {.fd = (int)syscall(SYS_pidfd_open, child, 0), .events = POLLIN},
    };
    int status = 0;
    while (sources[0].fd >= 0 || sources[1].fd >= 0) {
        poll(sources, 3, -1);
        for (int i = 0; i < 2; i++) {
            ssize_t size = sources[i].revents ? read(sources[i].fd, bytes, sizeof bytes) : 0;
            if (size > 0)
                send_frame(kinds[i], bytes, (size_t)size);
            else if (sources[i].revents)
                sources[i].fd = -1;
        }
        if (sources[2].revents) {
            waitpid(child, &status, 0);
            kill(-1, SIGKILL);
            close(sources[2].fd);
            sources[2] = (struct pollfd){.fd = -1};
        }
    }
    if (sources[2].fd >= 0)
        waitpid(child, &status, 0);
    close(sources[2].fd);
    while (waitpid(-1, NULL, WNOHANG) > 0)
        continue;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static int job_run(const struct job *job) {
    int output[2], errors[2];
    if (pipe2(output, O_CLOEXEC) || pipe2(errors, O_CLOEXEC))
        broken("a pipe");
    pid_t child = fork();
    if (child == 0)
        job_exec(job, output[1], errors[1]);
    close(output[1]);
    close(errors[1]);
    int status = job_follow(child, output[0], errors[0]);
    close(output[0]);
    close(errors[0]);
    return status;
}

/* Write result_bytes to the disk; gives the offset of the next result. */
static size_t result_write(size_t at, int64_t size) {
    if (size < 0)
        return at;
    disk_transfer(WRITE_MULTIPLE, at, result_bytes, (size_t)size);
    return at + ((size_t)size + BLOCK - 1) / BLOCK * BLOCK;
}

static void job_finish(const struct job *job, int status) {
    struct done done = {.status = status};
    memset(done.sizes, -1, sizeof done.sizes);
    done.sizes[0] = klogctl(3 /* SYSLOG_ACTION_READ_ALL */, (char *)result_bytes, RESULT_MOST);
    size_t at = result_write(RESULTS_AT, done.sizes[0]);
    if (job->trace)
        done.sizes[1] = result_read(TRACING "trace");
    at = result_write(at, done.sizes[1]);
    for (int i = 0; i < job->result_count; i++) {
        done.sizes[2 + i] = result_read(job->results[i]);
        at = result_write(at, done.sizes[2 + i]);
    }
    send_frame(FRAME_DONE, &done, sizeof done);
}

/* Each job has a folder of its own, in memory, gone with all that is in it when the job is done. */
static void job_serve(void) {
    mount("tmpfs", "/job", "tmpfs", 0, "size=75%");
    if (chdir("/job"))
        broken("/job");
    struct job job = job_next();
    klogctl(5 /* SYSLOG_ACTION_CLEAR */, NULL, 0);
    if (modules_load_again(job.kvm_params, job.vendor_params)) {
        if (job.trace)
            trace_start();
        int status = job_run(&job);
        if (job.trace)
            trace_stop();
        job_finish(&job, status);
    } else {
        char text[600];
        snprintf(text, sizeof text, "KVM cannot be loaded with the parameters %s %s: %s",
                 job.kvm_params, job.vendor_params, strerror(errno));
        send_frame(FRAME_REFUSED, text, strlen(text));
    }
    if (chdir("/") || umount2("/job", MNT_DETACH))
        broken("/job");
}

int main(void) {
    if (iopl(3))
        exit(1);
    mkdir("/dev", 0755);
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mkdir("/job", 0755);
    if (mount("devtmpfs", "/dev", "devtmpfs", 0, NULL) || mount("proc", "/proc", "proc", 0, NULL) ||
        mount("sysfs", "/sys", "sysfs", 0, NULL))
        broken("a file system");
    vendor_module = access("/modules/kvm_amd.ko", F_OK) ? "kvm_intel" : "kvm_amd";
    if (!module_load("irqbypass", "") || !modules_load("", ""))
        broken("KVM cannot be loaded");
    vfio_load();
    disk_command(SET_MULTIPLE_MODE, 0, BLOCK / SECTOR);
    send_bytes(READY, strlen(READY));
    is_ready = true;
    for (;;)
        job_serve();
}
