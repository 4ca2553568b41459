#include "server/database.h"

#include <sqlite3.h>

#include <cerrno>
#include <cstring>

#include "kernels/core/error.h"

namespace slalom {
namespace {

ErrorCode CodeOf(int sqlite_code) {
  switch (sqlite_code & 0xff) {
    case SQLITE_FULL:
      return ErrorCode::kResourceExhausted;
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
      return ErrorCode::kDataLoss;
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
    case SQLITE_CANTOPEN:
    case SQLITE_READONLY:
    case SQLITE_PERM:
      return ErrorCode::kFailedPrecondition;
    default:
      return ErrorCode::kInternal;
  }
}

}  // namespace

void Statement::Finalize::operator()(sqlite3_stmt* statement) const { sqlite3_finalize(statement); }
void Database::Close::operator()(sqlite3* connection) const { sqlite3_close(connection); }

Statement::Statement(Database& database, const char* sql) : database_(database) {
  sqlite3_stmt* statement = nullptr;
  Check(sqlite3_prepare_v2(database.connection_.get(), sql, -1, &statement, nullptr));
  statement_.reset(statement);
}

void Statement::Check(int code) const {
  if (code != SQLITE_OK) database_.Fail(code);
}

Statement& Statement::Bind(int index, std::int64_t value) {
  Check(sqlite3_bind_int64(statement_.get(), index, value));
  return *this;
}

Statement& Statement::BindText(int index, std::string_view value) {
  Check(sqlite3_bind_text64(statement_.get(), index, value.data(), value.size(), SQLITE_TRANSIENT,
                            SQLITE_UTF8));
  return *this;
}

Statement& Statement::BindBlob(int index, std::string_view value) {
  // A null pointer would bind NULL, not an empty blob.
  const char* data = value.empty() ? "" : value.data();
  Check(sqlite3_bind_blob64(statement_.get(), index, data, value.size(), SQLITE_TRANSIENT));
  return *this;
}

Statement& Statement::BindNull(int index) {
  Check(sqlite3_bind_null(statement_.get(), index));
  return *this;
}

bool Statement::Step() {
  const int code = sqlite3_step(statement_.get());
  if (code == SQLITE_ROW) return true;
  sqlite3_reset(statement_.get());
  sqlite3_clear_bindings(statement_.get());
  if (code != SQLITE_DONE) database_.Fail(code);
  return false;
}

bool Statement::IsNull(int column) const {
  return sqlite3_column_type(statement_.get(), column) == SQLITE_NULL;
}

std::int64_t Statement::Int(int column) const {
  return sqlite3_column_int64(statement_.get(), column);
}

std::string Statement::Bytes(int column) const {
  const auto* data = static_cast<const char*>(sqlite3_column_blob(statement_.get(), column));
  const int size = sqlite3_column_bytes(statement_.get(), column);
  return data == nullptr ? std::string() : std::string(data, static_cast<std::size_t>(size));
}

Database::Database(const std::string& path) : path_(path) {
  sqlite3* connection = nullptr;
  const int code =
      sqlite3_open_v2(path.c_str(), &connection,
                      SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX, nullptr);
  connection_.reset(connection);  // to be closed even after a failure
  if (code != SQLITE_OK) Fail(code);
  sqlite3_extended_result_codes(connection, 1);
  // The lock of a process that has just been killed goes within moments.
  sqlite3_busy_timeout(connection, 2000);
  Execute("PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL");
  // Takes the lock now, not with the first job.
  Execute("BEGIN EXCLUSIVE; COMMIT");
}

void Database::Execute(const char* sql) {
  const int code = sqlite3_exec(connection_.get(), sql, nullptr, nullptr, nullptr);
  if (code != SQLITE_OK) Fail(code);
}

int Database::version() {
  Statement statement(*this, "PRAGMA user_version");
  statement.Step();
  return static_cast<int>(statement.Int(0));
}

void Database::Fail(int code) const {
  std::string what = connection_ ? sqlite3_errmsg(connection_.get()) : sqlite3_errstr(code);
  const int reason = connection_ ? sqlite3_system_errno(connection_.get()) : 0;
  if (reason != 0) what += std::string(" (") + std::strerror(reason) + ")";
  if ((code & 0xff) == SQLITE_BUSY) what += "; does another server use this folder?";
  if ((code & 0xff) == SQLITE_FULL) what += "; make room on the server's disk";
  const bool not_writable = reason == EROFS || reason == EACCES || reason == EPERM;
  throw Error(not_writable ? ErrorCode::kFailedPrecondition : CodeOf(code),
              "state_dir: '" + path_ + "': " + what);
}

}  // namespace slalom
