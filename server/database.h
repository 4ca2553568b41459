// Database: the little of SQLite's interface that the job archive needs, with errors as Error.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

struct sqlite3;
struct sqlite3_stmt;

namespace slalom {

class Database;

// A prepared statement. Values are bound from 1 and read from column 0 on, as in SQLite. Belongs to
// its database and ends before it; one thread at a time.
class Statement {
 public:
  Statement(Database& database, const char* sql);

  Statement& Bind(int index, std::int64_t value);
  Statement& BindText(int index, std::string_view value);
  Statement& BindBlob(int index, std::string_view value);
  Statement& BindNull(int index);

  // True with a row, false at the end; then the statement is reset and its bindings are gone.
  // Throws Error.
  bool Step();
  // For a statement that gives no rows.
  void Run() {
    while (Step()) {
    }
  }

  bool IsNull(int column) const;
  std::int64_t Int(int column) const;
  std::string Bytes(int column) const;  // text or blob

 private:
  struct Finalize {
    void operator()(sqlite3_stmt* statement) const;
  };
  void Check(int code) const;

  Database& database_;
  std::unique_ptr<sqlite3_stmt, Finalize> statement_;
};

// A connection to one file that no other process may open meanwhile. In WAL mode with full
// synchronisation: what has been committed survives the end of the process and a loss of power. Not
// thread-safe.
//
// Errors: kFailedPrecondition (held by another process, no such folder, not writable), kDataLoss
// (damaged, or no database), kResourceExhausted (the disk is full), else kInternal; all name the
// file.
class Database {
 public:
  explicit Database(const std::string& path);

  Database(const Database&) = delete;
  Database& operator=(const Database&) = delete;

  void Execute(const char* sql);
  // PRAGMA user_version: the schema's number.
  int version();

 private:
  friend class Statement;
  struct Close {
    void operator()(sqlite3* connection) const;
  };
  [[noreturn]] void Fail(int code) const;

  const std::string path_;
  std::unique_ptr<sqlite3, Close> connection_;
};

}  // namespace slalom
