/* The first C code: read what the boot loader left, make traps work, run the lesson. */
#include "guest.h"
#include "pvh.h"
#include "runtime.h"

static struct {
    uint64_t seed;
    uint64_t memory_size;
    const char *command_line;
} boot;

uint64_t guest_seed(void) { return boot.seed; }
uint64_t guest_memory_size(void) { return boot.memory_size; }

/* What follows `name=` in the word with this number among those of the name, or NULL. */
static const char *parameter_find(const char *name, unsigned number) {
    size_t length = strlen(name);
    const char *word = boot.command_line;
    while (*word) {
        if (!memcmp(word, name, length) && word[length] == '=' && number-- == 0)
            return word + length + 1;
        while (*word && *word != ' ')
            word++;
        while (*word == ' ')
            word++;
    }
    return NULL;
}

bool guest_parameter_at(const char *name, unsigned number, char *value, size_t size) {
    const char *text = parameter_find(name, number);
    size_t length = 0;
    while (text && text[length] && text[length] != ' ' && length + 1 < size) {
        value[length] = text[length];
        length++;
    }
    value[length] = '\0';
    return text != NULL;
}

bool guest_parameter(const char *name, char *value, size_t size) {
    return guest_parameter_at(name, 0, value, size);
}

static uint64_t seed_parse(void) {
    char text[24];
    uint64_t seed = 0;
    guest_parameter("seed", text, sizeof text);
    for (const char *digit = text; *digit >= '0' && *digit <= '9'; digit++)
        seed = 10 * seed + (uint64_t)(*digit - '0');
    return seed;
}

/* RAM from gpa 0 up to the end of its last range. */
static uint64_t memory_measure(const struct hvm_start_info *info) {
    const struct hvm_memmap_table_entry *map = (const void *)info->memmap_paddr;
    uint64_t end = 0;
    for (uint32_t i = 0; i < info->memmap_entries; i++)
        if (map[i].type == XEN_HVM_MEMMAP_TYPE_RAM && map[i].addr + map[i].size > end)
            end = map[i].addr + map[i].size;
    return end;
}

void guest_exit(uint8_t status) {
    coverage_write();
    out8(PORT_EXIT, status);
    for (;;)
        halt();
}

void guest_start(uint64_t start_info_gpa) {
    const struct hvm_start_info *info = (const void *)start_info_gpa;
    trap_install();
    if (info->magic != XEN_HVM_START_MAGIC_VALUE)
        PANIC("no hvm_start_info: this image needs a PVH boot loader");
    boot.command_line = (const char *)info->cmdline_paddr;
    boot.memory_size = memory_measure(info);
    boot.seed = seed_parse();
    guest_main();
    guest_exit(0);
}
