/* Pages for page tables, and address spaces that contain the kernel. Mapping is lesson 2's. */
#include "guest.h"

extern char image_end[];
extern uint64_t boot_pml4[512];

/* Eight bytes at a time: some engines interpret each step of a string instruction. */
static void page_clear(uint64_t gpa) {
    uint64_t *to = page_table(gpa);
    uint64_t words = PAGE_SIZE / sizeof *to;
    __asm__ volatile("rep stosq" : "+D"(to), "+c"(words) : "a"(0) : "memory");
}

uint64_t page_alloc(void) {
    static uint64_t next_gpa;
    if (next_gpa == 0)
        next_gpa = ((uint64_t)image_end + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1);
    if (next_gpa >= PAGE_POOL_END || next_gpa >= guest_memory_size())
        PANIC("page_alloc: no page is left; is a loop allocating tables?");
    uint64_t gpa = next_gpa;
    next_gpa += PAGE_SIZE;
    page_clear(gpa);
    return gpa;
}

uint64_t address_space_create(void) {
    uint64_t root_gpa = page_alloc();
    page_table(root_gpa)[0] = boot_pml4[0];
    return root_gpa;
}
